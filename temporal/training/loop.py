"""The training loop: resumable to the bit, on one device or under torchrun, with EMA, mixed precision and a log.

    loop = Loop(LoopParams(steps=10_000, lr=1e-4), {"temporal": stack}, loss, folder, "temporal layers")
    loop.run()                          # again after an interruption: goes on where the last checkpoint is
    weights = loop.ema_state("temporal")

`torchrun --nproc-per-node N script.py` runs the same lines on N GPUs or in N CPU processes. Gradients are averaged over
the processes, and the first one writes. Everything random of a step follows from (seed, step, rank), so a resumed run
equals an uninterrupted one. The folder receives last.safetensors, last.json, log.jsonl, log.csv and log.png.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..atomic import write_text
from ..errors import VideoLDMError
from . import distributed
from .checkpoint import load_checkpoint, load_into, optimizer_state, save_checkpoint
from .cuda_graph import RecordedStep
from .ema import EMA
from .loss_inputs import RecordableLoss
from .plot import plot_log, read_log, write_csv
from .progress import Progress

PRECISIONS = ("auto", "float32", "bfloat16")
# May change between two runs of one training
FREE_SETTINGS = ("steps", "save_every", "log_every", "device", "cuda_graph")


@dataclass(frozen=True)
class LoopParams:
    """Settings of a run."""

    steps: int
    lr: float
    weight_decay: float = 0.01      # AdamW's, on matrices and kernels; never on biases, norms and mix factors
    grad_clip: float | None = 1.0   # largest norm of all gradients together; None: no limit
    warmup: int = 100               # steps of linear warm-up
    ema_decay: float = 0.9999       # 0: the average is the weights
    precision: str = "auto"         # auto: bfloat16 autocast on GPUs that have it, float32 elsewhere
    save_every: int = 500
    log_every: int = 20
    seed: int = 0
    lr_end: float | None = None     # what the rate falls to along half a cosine; None: it stays after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)
    device: str = "auto"
    cuda_graph: bool = False        # on one GPU: record a step once, then replay it; for small networks


@dataclass(frozen=True)
class StepContext:
    """What a loss needs to know about the step it computes."""

    step: int                       # 0-based
    seed: int
    rank: int
    world_size: int
    device: torch.device
    generator: torch.Generator      # on the CPU; seeded by (seed, step, rank)

    @classmethod
    def make(cls, step, seed, rank=0, world_size=1, device="cpu"):
        generator = torch.Generator().manual_seed(step_seed(seed, step, rank))
        return cls(step, seed, rank, world_size, torch.device(device), generator)

    def share(self, batch):
        """This process's part of a batch over all processes."""
        if batch % self.world_size:
            raise VideoLDMError(f"A batch of {batch} cannot be shared evenly by {self.world_size} processes. Use a "
                                f"multiple of {self.world_size}.")
        return batch // self.world_size


def step_seed(seed, step, rank):
    """A 63-bit seed that is unrelated between neighbouring steps and ranks."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _Network(nn.Module):
    """All trained modules and the loss as one module, which is what DistributedDataParallel wraps."""

    def __init__(self, modules, loss):
        super().__init__()
        self.trained = nn.ModuleDict(modules)
        self.loss = [loss]          # in a list: frozen modules inside the loss are not this module's

    def forward(self, step):
        return self.loss[0](step)


class Loop:
    """Trains the parameters of `modules` that require gradients.

    Constructing a Loop moves the modules to the device and loads folder/last.safetensors if there is one.

    Args:
        params: the settings.
        modules: by name, what is trained and saved.
        loss: `loss(step: StepContext)` returns a dict of scalars with the same names at every step. "loss" is what is
            minimised, the others are for the log. A loss that owns frozen modules has a method `to(device)`.
        folder: where checkpoints and logs go.
        title: what the console and messages call this training.
    """

    def __init__(self, params: LoopParams, modules: dict[str, nn.Module], loss: Callable, folder, title):
        self.params, self.modules, self.loss, self.title = params, dict(modules), loss, title
        self.folder = Path(folder)
        self.device = distributed.pick_device(params.device)
        self.autocast = self._autocast_dtype()
        for module in self.modules.values():
            module.to(self.device)
        if hasattr(loss, "to"):
            loss.to(self.device)
        self.parameters = self._trainable()
        self.optimizer = self._make_optimizer()
        self.ema = EMA(self.parameters, params.ema_decay)
        self.step, self.seconds = 0, 0.0
        self.saved_step: int | None = None      # of the last checkpoint
        self.pending: list[tuple[int, dict]] = []       # figures of the steps since the last line of the log
        self.recorded = self._recorded_step() if params.cuda_graph else None
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self):
        return self.folder / "last.safetensors"

    @property
    def log(self):
        return self.folder / "log.jsonl"

    def ema_state(self, name):
        """The state dict of a module with its averaged weights; frozen weights and buffers as they are. On the CPU."""
        state = {}
        for key, tensor in self.modules[name].state_dict().items():
            average = self.ema.average.get(f"{name}.{key}")
            state[key] = (tensor if average is None else average).detach().to("cpu", copy=True)
        return state

    def run(self, max_seconds=None, on_step=None):
        """Train until done, for at most `max_seconds`, or until `on_step(step, steps)` returns true. True when done.

        Raises VideoLDMError when the loss or the gradients stop being finite; the last checkpoint is then untouched.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with distributed.process_group(self.device), torch.random.fork_rng(devices=devices):
            network = self._wrap()
            progress = Progress(self.title, self.params.steps, self.step, enabled=distributed.rank() == 0)
            started, before = time.monotonic(), self.seconds
            self._start_log()
            stop = False
            while self.step < self.params.steps and not stop:
                self._train_step(network)
                self.seconds = before + time.monotonic() - started
                if self.step % self.params.log_every == 0 or self.step == self.params.steps:
                    progress.update(self.step, self._flush(), force=self.step == self.params.steps)
                stop = self._asked_to_stop(started, max_seconds, on_step)
                if self.step % self.params.save_every == 0 or self.step == self.params.steps or stop:
                    self._save()
            progress.close()
            distributed.barrier()
        return self.step >= self.params.steps

    # one step

    def _train_step(self, network):
        rank, world_size = distributed.rank(), distributed.world_size()
        recorded = self.recorded if world_size == 1 else None
        drawn_on = self.device if recorded is None else "cpu"
        context = StepContext.make(self.step, self.params.seed, rank, world_size, drawn_on)
        torch.manual_seed(step_seed(self.params.seed, self.step, f"dropout {rank}"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step)
        figures = recorded.figures(context) if recorded else self._figures(network, context)
        limit = self.params.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        figures = {name: torch.as_tensor(value).detach().float() for name, value in figures.items()}
        self.pending.append((self.step, figures | {"grad_norm": norm.detach().float()}))
        if self.device.type == "cpu":       # a GPU would have to be waited for: there, when the log is written
            self._refuse_bad([(self.step, {name: value.item() for name, value in self.pending[-1][1].items()})])
        self.optimizer.step()
        self.ema.update(self.parameters, self.step)
        self.step += 1

    def _figures(self, network, context):
        """The loss's figures of a step. The gradients are left with the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        figures = self._forward(network, context)
        figures["loss"].backward()
        return figures

    def _forward(self, network, context):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            figures = network(context)
        if not figures["loss"].requires_grad:
            raise VideoLDMError(f"The loss of '{self.title}' does not depend on any parameter that is trained.")
        return figures

    def _recorded_step(self):
        """What replays the steps, or None where there is no GPU. Several processes do not record either."""
        if not isinstance(self.loss, RecordableLoss) or getattr(self.loss, "checkpointing", False):
            raise VideoLDMError(f"'{self.title}' cannot be recorded as a CUDA graph: its loss draws while it computes, "
                                "or it checkpoints gradients. Train it with cuda_graph=False.")
        if self.device.type != "cuda":
            return None
        compute = self.loss.compute
        return RecordedStep(self.loss, lambda inputs: self._forward(compute, inputs),
                            list(self.parameters.values()), self.device)

    def lr_at(self, step):
        """Linear warm-up, then constant, or half a cosine down to lr_end."""
        p = self.params
        rate = p.lr
        if p.lr_end is not None:
            rate = p.lr_end + (p.lr - p.lr_end) * (1 + math.cos(math.pi * min(step / p.steps, 1.0))) / 2
        return rate * min(1.0, (step + 1) / p.warmup) if p.warmup else rate

    def _refuse_bad(self, rows):
        for step, figures in rows:
            bad = [f"{name} is {figures[name]}" for name in ("loss", "grad_norm") if not math.isfinite(figures[name])]
            if bad:
                kept = "No checkpoint had been written yet" if self.saved_step is None else \
                    f"The checkpoint of step {self.saved_step} in '{self.folder}' is kept"
                raise VideoLDMError(f"Training '{self.title}' stopped at step {step}: {' and '.join(bad)}. {kept}. "
                                    "Lower the learning rate or look for broken data, then run again.")

    def _asked_to_stop(self, started, max_seconds, on_step):
        late = max_seconds is not None and time.monotonic() - started >= max_seconds
        asked = on_step(self.step, self.params.steps) if on_step else False
        if max_seconds is None and on_step is None:
            return False
        return distributed.first_says(late or asked, self.device)

    # the log

    def _flush(self):
        """Check the figures since the last flush, append their means over steps and processes to the log."""
        if not self.pending:
            return {}
        names = sorted(self.pending[0][1])
        table = torch.stack([torch.stack([row[name] for name in names]) for _, row in self.pending])
        rows = distributed.mean(table).tolist()
        self._refuse_bad([(step, dict(zip(names, row))) for (step, _), row in zip(self.pending, rows)])
        self.pending = []
        means = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows))}
        if distributed.rank() == 0:
            line = {"step": self.step} | means | {"lr": self.lr_at(self.step - 1), "seconds": round(self.seconds, 2)}
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return {"loss": means["loss"]}

    def _start_log(self):
        """Drop the lines of steps that a crash threw away, so that the log has one line per step reached."""
        if distributed.rank() != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = read_log(self.log) if self.log.exists() else []
        write_text(self.log, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= self.step))

    # checkpoints

    def _save(self):
        self._flush()               # raises rather than save weights that are not finite
        self.saved_step = self.step
        if distributed.rank() != 0:
            return
        tensors = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.average.items()}
        for name, state in self._optimizer_states():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        state = {"title": self.title, "step": self.step, "seconds": self.seconds, "settings": asdict(self.params),
                 "world_size": distributed.world_size(), "torch": torch.__version__}
        save_checkpoint(self.checkpoint, tensors, state)
        write_csv(self.log, self.folder / "log.csv")
        plot_log(self.log, self.folder / "log.png", title=self.title)

    def _resume(self):
        tensors, state = load_checkpoint(self.checkpoint)
        load_into(self._weights(), tensors, "model.", self.checkpoint)
        load_into(self.ema.average, tensors, "ema.", self.checkpoint)
        self._load_optimizer(tensors)
        self.step, self.seconds, self.saved_step = state["step"], state["seconds"], state["step"]
        stored = state["settings"]
        changed = [key for key, value in json.loads(json.dumps(asdict(self.params))).items()
                   if key not in FREE_SETTINGS and stored.get(key, value) != value]
        if changed and distributed.rank() == 0:
            changes = ", ".join(f"{key} {stored[key]} -> {getattr(self.params, key)}" for key in changed)
            print(f"{self.title}: resumed at step {self.step} with other settings: {changes}")

    def _weights(self):
        """What a checkpoint stores of the modules: trained parameters and buffers, not frozen parameters."""
        weights: dict[str, torch.Tensor] = {}
        for name, module in self.modules.items():
            frozen = {key for key, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
            weights |= {f"{name}.{key}": t for key, t in module.state_dict().items() if key not in frozen}
        return weights

    def _optimizer_states(self):
        names = {id(p): name for name, p in self.parameters.items()}
        for parameter, state in self.optimizer.state.items():
            yield names[id(parameter)], state

    def _load_optimizer(self, tensors):
        """Load AdamW's state by load_state_dict, which puts its step counts on the right device."""
        names = {id(p): name for name, p in self.parameters.items()}
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        states = {index: optimizer_state(tensors, name, self.parameters[name], self.checkpoint)
                  for index, name in enumerate(order)}
        states = {index: state for index, state in states.items() if state}
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})

    # construction

    def _trainable(self):
        parameters = {f"{name}.{key}": p for name, module in self.modules.items()
                      for key, p in module.named_parameters() if p.requires_grad}
        if not parameters:
            raise VideoLDMError(f"There is nothing to train in '{self.title}': no parameter requires a gradient.")
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise VideoLDMError(f"'{name}' is {parameter.dtype}. Trained weights must be float32; mixed precision "
                                    "is a setting of the loop. Load the model in float32.")
        return parameters

    def _make_optimizer(self):
        decayed = [p for p in self.parameters.values() if p.ndim >= 2]
        plain = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.params.weight_decay},
                  {"params": plain, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.params.lr, betas=self.params.betas,
                                 fused=fused)

    def _autocast_dtype(self):
        if self.params.precision not in PRECISIONS:
            raise VideoLDMError(f"The precision '{self.params.precision}' is unknown. Use one of: "
                                f"{', '.join(PRECISIONS)}.")
        if self.params.precision == "auto":
            return self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return self.params.precision == "bfloat16"

    def _wrap(self) -> nn.Module:
        network: nn.Module = _Network(self.modules, self.loss)
        if not distributed.active():
            return network
        # A joint batch, or a dropped condition, may leave a parameter without a gradient in some step.
        network = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        if self.step == 0:          # DDP has just given every process the first one's weights
            self.ema = EMA(self.parameters, self.params.ema_decay)
        return network
