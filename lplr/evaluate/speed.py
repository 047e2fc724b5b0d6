"""How fast a model reads and writes, and the memory it takes, measured alone in a process of its own.

    reading     tokens a second of one forward pass over a prompt
    writing     tokens a second of greedy decoding after it, one sequence, one token a pass, with a cache of keys and values
    memory      the most that the process held: resident memory on the CPU, the allocator's peak on a GPU; and that before loading

The model is loaded in the type that its folder names.  The best of two rounds after one that is not counted: the first compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lplr.errors import CheckpointError
from lplr.hf.load import load_model

PROMPT, WRITTEN, ROUNDS = 128, 32, 2


class Speed(BaseModel):
    """Tokens a second, bytes, seconds to load; prompt and written are numbers of tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int
    written: int
    reading: float
    writing: float
    peak_memory: int
    idle_memory: int  # held before the model was loaded: the libraries
    load_seconds: float
    dtype: str
    device: str
    threads: int

    def table(self) -> list[tuple[str, str]]:
        """(measure, value) rows to print."""
        facts = f"{self.dtype}, {self.device}, {self.threads} threads"
        return [
            ("alone", f"{self.writing:,.1f} tokens a second written, {self.reading:,.1f} read ({facts})"),
            ("peak memory, alone", f"{self.peak_memory:,} bytes, {self.idle_memory:,} before loading"),
        ]


def measure_alone(path: Path, *, device: str = "cpu") -> Speed:
    """The speed of the model at `path` from a process of its own.  Raises CheckpointError with the end of what it said."""
    command = [sys.executable, "-m", "lplr.evaluate.speed", str(path), device]
    here = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CheckpointError(f"{path}: its speed could not be measured ({told}): leave --speed out")
    return Speed.model_validate_json(done.stdout.splitlines()[-1])


def measure(path: Path, device: str) -> Speed:
    """Load, read and write in this process, whose peak memory counts everything since its start."""
    idle, started = _peak(device), time.perf_counter()
    model = load_model(path, dtype="auto")  # type: ignore[arg-type]
    nn.Module.to(model, device)
    loaded = time.perf_counter() - started
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    rounds = [_round(model, prompt) for _ in range(1 + ROUNDS)][1:]
    return Speed(
        prompt=PROMPT,
        written=WRITTEN,
        reading=PROMPT / min(read for read, _ in rounds),
        writing=WRITTEN / min(write for _, write in rounds),
        peak_memory=_peak(device),
        idle_memory=idle,
        load_seconds=loaded,
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        threads=torch.get_num_threads(),
    )


@torch.inference_mode()
def _round(model: nn.Module, prompt: Tensor) -> tuple[float, float]:
    """Seconds of reading the prompt (1, s) and of writing WRITTEN tokens."""
    times = [_now(prompt)]
    out = model(input_ids=prompt, use_cache=True)
    times.append(_now(prompt))
    for _ in range(WRITTEN):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    times.append(_now(prompt))
    return times[1] - times[0], times[2] - times[1]


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # the resource module's figure would count what the parent held when this process was started
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def main() -> None:
    """python -m lplr.evaluate.speed MODEL DEVICE: one line of JSON."""
    sys.stdout.write(json.dumps(measure(Path(sys.argv[1]), sys.argv[2]).model_dump()) + "\n")


if __name__ == "__main__":
    main()
