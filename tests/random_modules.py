"""Writes the source code of random nn.Modules, with usual and unusual statements."""

import random
from collections.abc import Callable

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from benchmarks.torchvision_import import torchvision
"""
CHANNELS = 4
SPATIAL = {1: (6,), 2: (4, 4), 3: (2, 3, 3)}
CONVOLUTIONS = [
    "3, padding=1", "3, padding=1, bias=False", "1", "1, bias=False", "3, padding=1, groups=2",
    "3, padding=2, dilation=2, bias=False", "3, padding='same'",
    "3, padding=1, padding_mode='circular'", "3, padding=1, groups=4, bias=False",
]  # fmt: skip
NORMS = ["", "", "", "affine=False", "momentum=0.3", "momentum=None", "eps=0.1"]
MODULES = [
    "ReLU()", "ReLU(inplace=True)", "ReLU()", "ReLU6()", "Hardtanh(0, 6)", "LeakyReLU(0.2, True)",
    "SiLU()", "GELU()", "GELU('tanh')", "Sigmoid()", "Hardswish()", "ELU()", "Identity()",
]  # fmt: skip
ACTIVATIONS = [
    "F.relu({x})", "F.relu({x}, True)", "F.relu({x}, inplace=True)", "F.relu_({x})", "{x}.relu()",
    "torch.relu({x})", "torch.relu_({x})", "{x}.relu_()", "F.relu6({x})", "F.relu6({x}, True)",
    "F.hardtanh({x}, 0.0, 6.0)", "F.hardtanh({x})", "{x}.clamp(0, 6)", "torch.clamp({x}, 0, 6)",
    "{x}.clamp_(0, 6)", "{x}.clamp(min=0)", "F.leaky_relu({x}, 0.3)", "F.leaky_relu_({x}, 0.3)",
    "F.silu({x})", "F.silu({x}, inplace=True)", "F.gelu({x})", "F.gelu({x}, approximate='tanh')",
    "F.sigmoid({x})", "torch.sigmoid({x})", "{x}.sigmoid_()", "F.hardswish({x})", "F.elu({x})",
]  # fmt: skip
ADDITIONS = [
    "{x} + {y}", "{x} + {y}", "{y} + {x}", "torch.add({x}, {y})", "{x}.add({y})", "{y}.add({x})",
    "{x}.add_({y})", "{y}.add_({x})", "torch.add({x}, {y}, alpha=2)", "{x}.add({y}, alpha=0.5)",
    "{x} + {x}", "{x} + {y}.mean(0, keepdim=True)", "{x} + {y}[:1]", "{x}.add_({y}.mean(0))",
    "{x} + 1", "{x} * 0.5 + {y}", "{x} - {y}",
]  # fmt: skip
# Views and aliases of x. Those in VIEWS have the shape of x, those in PARTS have other shapes.
VIEWS = ["{x}.detach()", "{x}.view({x}.shape)", "{x}[:]", "{x}.expand_as({x})", "{x}.contiguous()"]
PARTS = ["{x}[:, :2]", "{x}[0]", "{x}.chunk(2, 1)[0]", "{x}.transpose(0, 1)", "{x}.flatten(1)"]
WRITES = [
    "{x}.mul_(0.5)", "{x} += 1", "{x}.add_(1)", "{x}[0] = 0", "{x}[:1] *= 2", "{x}.relu_()",
    "{x}.copy_({x}.flip(0))", "{x}.detach().mul_(2)", "F.relu({x}, inplace=True)",
    "F.dropout({x}, 0.5, True, True)", "torch.sub({x}, 1, out={x})",
    "torch._foreach_mul_([{x}], 2.0)",
    "{x}.masked_fill_({x} > 1, 0.5)", "{x}.clamp_(-2, 2)",
]  # fmt: skip
# READS read a norm's statistics. STATISTICS write them. AFFINE read or write the norm's weight or
# bias.
READS = [
    "{new} = {x} * {norm}.running_var.mean()", "{new} = {x} + {norm}.running_mean.sum()",
    "{new} = {x} + {norm}.num_batches_tracked", "{new} = {x} * float({norm}.running_var[0])",
    "{new} = {x} * (1 + {norm}.num_batches_tracked.item())",
]  # fmt: skip
STATISTICS = [
    "{norm}.running_mean.mul_(0.9)", "{norm}.running_var[:2] += 0.5", "{norm}.running_var *= 2",
    "{norm}.num_batches_tracked.add_(1)", "{norm}.num_batches_tracked += 1",
    "{norm}.running_mean = {norm}.running_mean * 0.5", "{norm}.reset_running_stats()",
]  # fmt: skip
AFFINE = [
    "{new} = {x} * {norm}.weight.mean()", "with torch.no_grad(): {norm}.weight.mul_(0.9)",
    "with torch.no_grad(): {norm}.bias += 1", "{norm}.bias.data.add_(1)",
]  # fmt: skip
BREAKS = [
    "torch._dynamo.graph_break()", "print(end='')", "{new} = {x} * (1 + abs({x}.mean().item()))"
]  # fmt: skip
OTHERS = [
    "{new} = {x} * 2", "{new} = torch.exp(-{x}.square())",
    "{new} = F.dropout({x}, 0.3, self.training)",
    "{x}.register_hook(lambda g: g * 2) if {x}.requires_grad else None", "{new} = {x}.clone()",
]  # fmt: skip
CONDITIONS = ["self.flag", "self.training", "x.shape[0] > 3", "x.requires_grad", "self.scale > 1"]
REGIONS = [
    "with torch.no_grad():", "with torch.set_grad_enabled(self.flag):", "with torch.enable_grad():",
    "with torch.autocast('cpu', torch.bfloat16):", "if True:",
]  # fmt: skip


class Writer:
    """Writes one class. Variables in ``names`` have the shape of x, those in ``parts`` don't."""

    def __init__(self, rng: random.Random, name: str = "Net", dims: int = 0) -> None:
        self.rng, self.name = rng, name
        self.dims = dims or rng.choices((1, 2, 3), (1, 12, 1))[0]
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.methods: list[str] = []
        self.blocks: list[str] = []
        self.names, self.parts = ["x"], []
        self.norms: list[tuple[str, bool, bool]] = []
        self.convs: list[str] = []
        self.indent = 2
        self.count = 0

    def source(self) -> str:
        """Writes the body of forward, and returns the source of the class and of its blocks."""
        self.statements(self.rng.choice((1, 2, 2, 3)))
        self.emit(f"return {self.result()}")
        body = ["def __init__(self):", "    super().__init__()", *("    " + s for s in self.setup)]
        body += ["    self.flag, self.scale = True, 1.0", "", "def forward(self, x):"]
        own = [f"class {self.name}(nn.Module):", *("    " + line for line in body)]
        return "\n".join([*self.blocks, *own, *self.lines, *self.methods, ""])

    def result(self) -> str:
        if self.name != "Net":
            return self.names[-1]
        found = [self.names[-1], *self.some(self.names), *self.some(self.parts)]
        found += [f"{norm}.running_mean" for norm, tracked, _ in self.some(self.norms) if tracked]
        self.rng.shuffle(found)
        return ", ".join(found) + ","

    def some(self, of: list) -> list:
        """Returns zero, one or two items drawn at random, possibly the same item twice."""
        return self.rng.choices(of, k=self.rng.choice((0, 0, 0, 1, 1, 2))) if of else []

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def pick(self) -> str:
        """Returns the name of a variable with the shape of x.

        The variable is drawn at random, often from the two that were assigned last.
        """
        return self.rng.choice([*self.names, *self.names[-2:] * 2])

    def new(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def assign(self, expression: str, names: list[str] | None = None) -> str:
        """Writes an assignment to a new or an old variable, and returns the variable's name."""
        names = self.names if names is None else names
        old = names is self.names and self.rng.random() < 0.1
        name = self.rng.choice(names) if old else self.new()
        apart = self.rng.random() < 0.04
        if apart:
            self.emit(self.rng.choice(REGIONS))
        self.emit("    " * apart + f"{name} = {expression}")
        if old:
            names.remove(name)
        names.append(name)
        return name

    def write(self, templates: list[str], x: str = "", norm: str = "") -> None:
        """Writes a statement from a random template. A template with {new} adds a variable."""
        template, new = self.rng.choice(templates), self.new()
        self.emit(template.format(x=x or self.pick(), norm=norm, new=new))
        if "{new}" in template:
            self.names.append(new)

    def declare(self, kind: str, value: str) -> str:
        name = f"self.{kind}{len(self.setup)}"
        self.setup.append(f"{name} = {value}")
        return name

    def conv(self) -> str:
        if not self.convs or self.rng.random() < 0.8:
            c, options = CHANNELS, self.rng.choice(CONVOLUTIONS)
            self.convs.append(self.declare("conv", f"nn.Conv{self.dims}d({c}, {c}, {options})"))
        return self.rng.choice(self.convs[-2:])

    def norm(self) -> str:
        """Returns the name of a new batch norm, or of one that is already used."""
        rng = self.rng
        if self.norms and rng.random() < 0.12:
            return rng.choice(self.norms)[0]
        if self.dims == 2 and rng.random() < 0.06:
            return self.declare("norm", f"torchvision.ops.FrozenBatchNorm2d({CHANNELS})")
        options, tracked = rng.choice(NORMS), rng.random() < 0.93
        arguments = ", ".join([str(CHANNELS), *[options] * bool(options)])
        arguments += "" if tracked else ", track_running_stats=False"
        name = self.declare("norm", f"nn.BatchNorm{self.dims}d({arguments})")
        if tracked and self.norms and self.norms[-1][1] and rng.random() < 0.04:
            shared = "num_batches_tracked"
            self.setup.append(f"{name}.{shared} = {self.norms[-1][0]}.{shared}")
        if rng.random() < 0.1:
            self.setup.append(f"{name}.eval()")
        self.norms.append((name, tracked, options != "affine=False"))
        return name

    def statements(self, count: int) -> None:
        choices: list[tuple[Callable[[], None], int]] = [
            (self.chain, 12), (self.disturb, 2), (self.branch, 1), (self.region, 1), (self.part, 1),
            (self.nested, 1),
        ]  # fmt: skip
        for _ in range(count):
            self.rng.choices(*zip(*choices, strict=True))[0]()

    def chain(self) -> None:
        """Writes a batch norm and operations that can be fused, perhaps with others in between."""
        rng, x = self.rng, self.pick()
        if rng.random() < 0.5:
            x = self.assign(f"{self.conv()}({x})")
            self.perhaps_disturb()
        y = self.normalised(self.pick()) if rng.random() < 0.15 else self.pick()
        x = self.normalised(x)
        self.perhaps_disturb()
        if rng.random() < 0.5:
            x = self.assign(rng.choice(ADDITIONS).format(x=x, y=y))
            self.perhaps_disturb()
        if rng.random() < 0.8:
            module = rng.random() < 0.4
            act = self.declare("act", f"nn.{rng.choice(MODULES)}") + "({x})" if module else ""
            x = self.assign((act or rng.choice(ACTIVATIONS)).format(x=x))
            self.perhaps_disturb()
        if rng.random() < 0.25:
            pool = rng.choice((f"F.max_pool{self.dims}d", f"F.avg_pool{self.dims}d"))
            self.assign(f"{pool}({x}, 3, stride=1, padding=1)")

    def normalised(self, x: str) -> str:
        norm = self.norm()
        tracked = [name for name, tracked, affine in self.norms if tracked and affine]
        if norm in tracked and self.rng.random() < 0.06:
            tensors = ", ".join(
                f"{norm}.{n}" for n in ("running_mean", "running_var", "weight", "bias")
            )
            return self.assign(f"F.batch_norm({x}, {tensors}, {norm}.training, 0.2)")
        return self.assign(f"{norm}({x})")

    def perhaps_disturb(self) -> None:
        if self.rng.random() < 0.1:
            self.disturb()

    def disturb(self) -> None:
        """Writes a statement that may prevent a batch norm from being fused."""
        kind = self.rng.choice(("view", "part", "write", "write", "other", "break", "norm", "norm"))
        if kind == "view":
            self.assign(self.rng.choice(VIEWS).format(x=self.pick()))
        elif kind == "part":
            self.assign(self.rng.choice(PARTS).format(x=self.pick()), self.parts)
        elif kind == "write":
            self.write(WRITES, self.rng.choice([self.pick(), *self.parts[-1:]]))
        elif kind == "norm" and self.norms:
            norm, tracked, affine = self.rng.choice(self.norms)
            self.write([*(READS + STATISTICS) * tracked, *AFFINE * affine] or OTHERS, norm=norm)
        else:
            self.write(BREAKS if kind == "break" and self.rng.random() < 0.5 else OTHERS)

    def body(self, x: str | None = None) -> str:
        """Writes the statements of a block, and returns the name of the block's result."""
        names, parts = self.names, self.parts
        self.names, self.parts = [x] if x else list(names), [] if x else list(parts)
        self.indent += not x
        self.statements(1)
        self.indent -= not x
        found, self.names, self.parts = self.names[-1], names, parts
        return found

    def branch(self) -> None:
        new = self.new()
        for line in (f"if {self.rng.choice(CONDITIONS)}:", "else:"):
            self.emit(line)
            self.emit(f"    {new} = {self.body()}")
        self.names.append(new)

    def region(self) -> None:
        new = self.new()
        self.emit(self.rng.choice(REGIONS))
        self.emit(f"    {new} = {self.body()}")
        self.names.append(new)

    def part(self) -> None:
        """Writes a method, and a call of this method. The call may be checkpointed."""
        name = f"part{len(self.methods)}"
        before, self.lines, indent, self.indent = self.lines, [], self.indent, 2
        self.methods.append("")
        result = self.body("x")
        self.methods += [f"    def {name}(self, x):", *self.lines, f"        return {result}"]
        self.lines, self.indent = before, indent
        x = self.pick()
        checkpointed = f"checkpoint(self.{name}, {x}, use_reentrant=False)"
        self.assign(self.rng.choice((checkpointed, f"self.{name}({x})")))

    def nested(self) -> None:
        """Writes one or two calls of a module of another class, or of an nn.Sequential."""
        if self.name == "Net" and self.rng.random() < 0.6:
            inner = Writer(self.rng, f"Block{len(self.blocks)}", self.dims)
            self.blocks.append(inner.source())
            block = self.declare("block", f"{inner.name}()")
        else:
            block = self.declare(
                "sequence", f"nn.Sequential({self.conv()}, {self.norm()}, nn.ReLU())"
            )
        for _ in range(self.rng.choice((1, 1, 2))):
            self.assign(f"{block}({self.pick()})")


def write_module(seed: int) -> tuple[str, tuple[int, ...]]:
    """Returns the source of a Python module with the class ``Net``, and the shape of one input."""
    writer = Writer(random.Random(seed))
    return HEADER + "\n\n" + writer.source(), (CHANNELS, *SPATIAL[writer.dims])
