"""
Which functions of which framework are stages: one file per framework, installed as `gpuscope.integrations`.

Each file uses gpuscope's public names only. `instrument` imports it once the program has imported its framework.
"""
