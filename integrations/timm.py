"""
timm: `forward` of each model that `timm.create_model` makes, with the model's name and the batch size.

Run against timm 1.0.31. A class of models is wrapped when the first of it is made. For what happens within a model, by
module, see `gpuscope.integrations.modules`; a model that the program compiles as a whole has no stage of its own.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from timm.models import _factory

from gpuscope.instrument import instrument

from ._wrapping import method_of, replace

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE = "timm.models._factory"
TARGETS = ()
_BATCH = {"batch_size": "x.shape[0]"}
_NAME = {"model": "self.pretrained_cfg['architecture']"}


def install() -> Callable[[], None]:
    """Wrap what `create_model` looks functions up by: itself it is copied to where no later import finds it."""
    undo = contextlib.ExitStack()
    replace(undo, _factory, "model_entrypoint", _model_entrypoint)
    return undo.close


def _model_entrypoint(function: Any) -> Any:
    def model_entrypoint(*args: Any, **kwargs: Any) -> Any:
        create = function(*args, **kwargs)

        @functools.wraps(create)
        def create_and_follow(*args: Any, **kwargs: Any) -> Any:
            model = create(*args, **kwargs)
            name = _NAME if hasattr(model, "pretrained_cfg") else {}
            instrument(method_of("forward", type(model), "forward", {**name, **_BATCH}))
            return model

        return create_and_follow

    return model_entrypoint
