"""
`profile`: the deep look at a few requests of a loop, by torch.profiler.

For the workbench, as `measure` is: it waits for the GPU once, when the profile ends. Imports what it needs only when it
is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._measure import check_count

if TYPE_CHECKING:
    from gpuscope._profiling.deep_look import DeepLook


def profile(requests: int = 5, warmup: int = 3) -> DeepLook:
    """
    Look into a few requests of a loop with torch.profiler: kernels, copies, waits and gaps, by stage.

    A request is an outermost stage. The profile begins after the warm-up and ends by itself; the loop goes on as
    before. If recording is off, stages are recorded for the length of the block and exported nowhere. If another
    profiler is on, or PyTorch is not imported, the loop runs without a profile, and `why` of the result says so.

    Examples:
        ```
        with gpuscope.profile() as look:
            for batch in batches:
                with gpuscope.stage("request"):
                    model(batch)
        print(look)
        look.save("profile")
        ```

    Args:
        requests: how many requests to profile.
        warmup: how many requests to let pass first. With 0 the profile begins at once, and shows what only first
            calls do.

    Raises:
        TypeError: for what is not a whole number.
        ValueError: for fewer than one request, or a negative `warmup`.

    """
    check_count("requests", requests, 1)
    check_count("warmup", warmup, 0)
    from gpuscope._profiling.deep_look import DeepLook
    from gpuscope._profiling.session import ProfilingSession
    from gpuscope._runtime import period

    return DeepLook(ProfilingSession(requests, warmup), period)
