"""
timm: `forward` of each model that `timm.create_model` makes, with the model's name and the batch size.

Run against timm 1.0.31. A class of models is wrapped when its first model is made. For the modules inside a model, see
`gpuscope.integrations.modules`. A model that the program compiles as a whole has no stage.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from timm.models import _factory

from gpuscope.instrument import instrument

from ._wrapping import method_of, replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._wrapping import Function

MODULE = "timm.models._factory"
TARGETS = ()
_BATCH = {"batch_size": "x.shape[0]"}
_NAME = {"model": "self.pretrained_cfg['architecture']"}


def install() -> Callable[[], None]:
    """Wrap the look-up that `create_model` uses: `create_model` itself is copied to where no later import finds it."""
    undo = contextlib.ExitStack()
    replace(undo, _factory, "model_entrypoint", _model_entrypoint)
    return undo.close


def _model_entrypoint(function: Callable[..., Function]) -> Function:
    def model_entrypoint(*args: object, **kwargs: object) -> Function:
        create = function(*args, **kwargs)

        @functools.wraps(create)
        def create_and_follow(*args: object, **kwargs: object) -> object:
            model = create(*args, **kwargs)
            name = _NAME if hasattr(model, "pretrained_cfg") else {}
            instrument(method_of("forward", type(model), "forward", {**name, **_BATCH}))
            return model

        return create_and_follow

    return model_entrypoint
