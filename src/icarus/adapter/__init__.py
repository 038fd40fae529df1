"""The adapters of specialists: PEFT directories that may share a KV cache, on disk and on a loaded model.

    files          the files of a directory, and reading them
    stored         tensors in files, read when they are asked for
    settings       what a config says, of either kind of adapter
    weights        the tensors of either kind, beside their config and the base model
    checks         may the adapter in a directory share a cache?
    conventional   may one without the marker be served, with a cache of its own?
    fingerprints   the identity of a base model: one hash of its weights
    projections    the linear projections of a base model, by name
    location       from a path or a Hub repository to a local directory
    attachment     adapters on a loaded model; imports PEFT
    storage        directories written from a model and loaded into one; imports PEFT
    model_card     the README.md of a directory
    merging        a conventional adapter's weights added to the base model's; imports PEFT
    undo           a model as it was, after an error

The names below are imported when first used: whoever only verifies a directory loads neither PEFT nor Transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icarus.adapter.attachment import attach, attach_conventional, check_attached, decoder_targets, names, twin
    from icarus.adapter.checks import AdapterInfo, feeds_kv, problems, verify
    from icarus.adapter.conventional import ConventionalInfo, conventional_problems, verify_conventional
    from icarus.adapter.files import CONFIG_NAME, MARKER_VERSION, WEIGHTS_NAME, is_conventional, is_icarus
    from icarus.adapter.fingerprints import fingerprint
    from icarus.adapter.location import locate, weights_name
    from icarus.adapter.merging import merge
    from icarus.adapter.storage import from_pretrained, load, push_to_hub, save, save_conventional

_HOMES = {
    "CONFIG_NAME": "files",
    "MARKER_VERSION": "files",
    "WEIGHTS_NAME": "files",
    "AdapterInfo": "checks",
    "ConventionalInfo": "conventional",
    "attach": "attachment",
    "attach_conventional": "attachment",
    "check_attached": "attachment",
    "conventional_problems": "conventional",
    "decoder_targets": "attachment",
    "feeds_kv": "checks",
    "fingerprint": "fingerprints",
    "from_pretrained": "storage",
    "is_conventional": "files",
    "is_icarus": "files",
    "load": "storage",
    "locate": "location",
    "merge": "merging",
    "names": "attachment",
    "problems": "checks",
    "push_to_hub": "storage",
    "save": "storage",
    "save_conventional": "storage",
    "twin": "attachment",
    "verify": "checks",
    "verify_conventional": "conventional",
    "weights_name": "location",
}

__all__ = [
    "CONFIG_NAME",
    "MARKER_VERSION",
    "WEIGHTS_NAME",
    "AdapterInfo",
    "ConventionalInfo",
    "attach",
    "attach_conventional",
    "check_attached",
    "conventional_problems",
    "decoder_targets",
    "feeds_kv",
    "fingerprint",
    "from_pretrained",
    "is_conventional",
    "is_icarus",
    "load",
    "locate",
    "merge",
    "names",
    "problems",
    "push_to_hub",
    "save",
    "save_conventional",
    "twin",
    "verify",
    "verify_conventional",
    "weights_name",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'icarus.adapter' has no attribute {name!r}")
    return getattr(import_module(f"icarus.adapter.{_HOMES[name]}"), name)
