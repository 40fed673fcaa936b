"""Where the time of one request went, batches that worked for it included: `explain.Explainer`."""
