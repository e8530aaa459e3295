"""Export: from a run's checkpoint to a folder that Hugging Face clients load."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from titan.checkpoint.folder import FROZEN, complete_steps, step_folder
from titan.checkpoint.llama import llama_config, llama_tensors
from titan.checkpoint.load import Checkpoint
from titan.config.environment import user_cache_variable
from titan.config.model import ModelSettings, Precision
from titan.config.settings import RunConfig
from titan.data.shards import TOKENIZER_FILE
from titan.data.tokenizer import Tokenizer
from titan.data.tokenizer_json import hugging_face_tokenizer
from titan.errors import CheckpointError, ConfigError, DataError
from titan.model.parameters import num_parameters
from titan.observe.events import read_events
from titan.observe.files import read_config

SHARD_BYTES = 5 * 10**9
"""A file of weights is closed before it grows beyond this; also what an export holds in memory."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written, and from what."""

    folder: Path
    role: str
    step: int
    num_parameters: int


def export_role(
    run: Path, student: str | None, out: Path, *, dtype: Precision = "fp32", step: int | None = None
) -> Exported:
    """Write the teacher, or a student, as a Llama model. The folder appears whole or not at all.

    out:  must not exist or be empty
    step: which checkpoint; the newest without it
    Raises RunError, ConfigError, CheckpointError or DataError for what is missing, damaged or in the way.
    """
    config = read_config(run)
    role = _role(config, student)
    _require_room(out)
    checkpoint = _open_checkpoint(run, config, role, step)
    if FROZEN in checkpoint.manifest:
        raise ConfigError(
            f"{run}: its teacher is {checkpoint.manifest[FROZEN]} and was not trained; copy that folder, or export a "
            "student with --student NAME"
        )
    model = ModelSettings.model_validate(checkpoint.manifest["model"])
    vocab_size: int = checkpoint.manifest["vocab_size"]
    tokenizer = _find_tokenizer(run, config, checkpoint)
    length = config.data.sequence_length
    theirs = hugging_face_tokenizer(tokenizer.path, length)
    torch_name = str(DTYPES[dtype]).removeprefix("torch.")
    ours, generation = llama_config(model, vocab_size, length, torch_name, theirs.end_id, theirs.padding_id)
    files = {"config.json": ours, "generation_config.json": generation, **theirs.files}
    with _whole_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
        _write_weights(folder, _rounded(llama_tensors(checkpoint, model, vocab_size), dtype))
    return Exported(out, role, checkpoint.step, num_parameters(model, vocab_size))


def _role(config: RunConfig, student: str | None) -> str:
    names = [student.name for student in config.students]
    if student is None:
        return "teacher"
    if student not in names:
        known = f"students are {', '.join(names)}" if names else "the run has none"
        raise ConfigError(f"--student {student}: no such student, {known}; leave --student out for the teacher")
    return student


def _open_checkpoint(run: Path, config: RunConfig, role: str, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest. Raises CheckpointError with the steps that there are."""
    role_folder = run / "checkpoints" / role
    steps = complete_steps(role_folder)
    if not steps:
        raise CheckpointError(
            f"{role_folder} has no complete checkpoint; there is one every {config.checkpoint.every_steps} steps "
            "(checkpoint.every_steps) and after the last: wait, or `titan resume` the run"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"--step {step}: {role_folder} has checkpoints of steps {', '.join(map(str, steps))}; "
            "name one of them, or leave --step out for the newest"
        )
    return Checkpoint(step_folder(role_folder, steps[-1] if step is None else step))


def _find_tokenizer(run: Path, config: RunConfig, checkpoint: Checkpoint) -> Tokenizer:
    """The run's copy of its tokenizer, or that of its prepared corpus. Raises DataError if both are gone."""
    name, vocab_size = checkpoint.manifest["corpus"], checkpoint.manifest["vocab_size"]
    said = [Path(str(event["corpus"])) for event in read_events(run) if event["event"] == "data_ready"]
    caches = [config.data.cache, user_cache_variable(), Path(os.path.abspath(run)).parent / "data"]
    folders = [run, *(path for path in said if path.name == name), *(Path(cache) / name for cache in caches if cache)]
    for folder in folders:
        if (folder / TOKENIZER_FILE).is_file():
            tokenizer = Tokenizer(folder / TOKENIZER_FILE)
            if tokenizer.vocab_size != vocab_size:
                raise DataError(
                    f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model {vocab_size}; "
                    "restore the corpus folder the run used"
                )
            return tokenizer
    looked = ", ".join(str(folder.parent) for folder in dict.fromkeys(folders))
    raise DataError(
        f"the corpus {name} of {run} is not in {looked}; export needs its {TOKENIZER_FILE}: "
        f"put TITAN_CACHE=FOLDER in front, where FOLDER/{name} is the corpus"
    )


def _rounded(tensors: Iterable[tuple[str, Tensor]], dtype: Precision) -> Iterator[tuple[str, Tensor]]:
    """The tensors in another type. Raises ConfigError where fp16 has no number as large."""
    for name, tensor in tensors:
        rounded = tensor.to(DTYPES[dtype])
        if dtype == "fp16" and bool((rounded.isinf() & ~tensor.isinf()).any()):
            largest = float(tensor.abs().max())
            raise ConfigError(f"--dtype fp16: {name} has values up to {largest:.3g}, fp16 ends at 65504; use bf16")
        yield name, rounded


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One model.safetensors, or numbered shards with an index when there is more than SHARD_BYTES."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        save_file(pending, folder / _draft(len(shards)), metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / _draft(len(shards)))  # safetensors writes for the owner only
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
        # a copy, so that a slice does not keep the whole parameter it was cut from
        pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _draft(0)).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _draft(number)).rename(folder / final)
        places |= dict.fromkeys(names, final)
    index: dict[str, Any] = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _draft(number: int) -> str:
    """Name of a shard while it is not known how many there will be."""
    return f"shard-{number}.draft"


def _require_room(out: Path) -> None:
    """Raise ConfigError if something is in the way."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "holds files already" if out.is_dir() else "is a file"
        raise ConfigError(f"--out {out} {what}; name a folder that is empty or does not exist")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill, which takes its place when the block ends well and else goes away.

    Raises CheckpointError if it cannot be written.
    """
    target = Path(os.path.abspath(out))
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        draft.mkdir(parents=True)
        yield draft
        draft.rename(target)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(f"cannot write {out}: {reason}; make room or choose another --out") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
