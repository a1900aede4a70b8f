"""The rows of the table: what is run on both sides, on the same tensors."""

import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Callable

import peft
import torch

import peft_compare as ours
from measure import Watch, Wrong, agree, looped, repeated

QUICK = False


@dataclass
class Target:
    """`ratio` must be at most (<=) or at least (>=) `value`."""

    ratio: str
    op: str
    value: float
    text: str = ""

    def reached(self, measured):
        return measured <= self.value if self.op == "<=" else measured >= self.value

    def __str__(self):
        sign = "≤" if self.op == "<=" else "≥"
        return self.text or f"{self.ratio.replace('/', ' / ')} {sign} {self.value:g}"


@dataclass
class Trial:
    """What one row runs. A variant gives the seconds of n steps; what needs no
    clock stands in `exact`, by the ratio's name."""

    variants: dict = field(default_factory=dict)
    check: Callable = lambda: {}
    exact: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    repeats: int = None  # steps in a sample, where 5 ms are not the measure
    rounds: int = None


@dataclass
class Row:
    group: str
    name: str
    make: Callable
    targets: list
    cost: float = 2.0  # seconds, roughly, for the time left
    profiled: bool = True

    @property
    def key(self):
        return f"{self.group}: {self.name}"


def at_most(value, ratio="ours/base"):
    return Target(ratio, "<=", value)


def at_least(value, ratio="HF/ours"):
    return Target(ratio, ">=", value)


def small(value, quick):
    return min(value, quick) if QUICK else value


# Both sides on one set of tensors.


def hf_settings(r, alpha, dropout=0.0, dora=False, targets=("layer",)):
    return peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora,
        target_modules=list(targets))


def hf_tensors(model, name="default", prefix="base_model.model."):
    """The parameters of one adapter under the names they have in a file."""
    tensors = {}
    for key, p in model.named_parameters():
        if f".{name}" in key and "lora_" in key:
            key = key.removeprefix(prefix).replace(f".{name}", "")
            if "lora_magnitude_vector" in key:
                key = key.removesuffix(".weight")
            tensors[key] = p
    return tensors


def fill(tensors):
    """Makes a fresh adapter one that was trained: B is not zero."""
    for key, p in tensors.items():
        if "lora_magnitude_vector" not in key:
            torch.nn.init.normal_(p, std=0.5 / math.sqrt(p.shape[1]))


def shared(tensors):
    return {key: p.detach() for key, p in tensors.items()}


def kinds(results):
    """y, dx, dA, dB and so on, each a list of tensors."""
    names = {"y": "y", "x": "dx"}
    found = {}
    for key in sorted(results):
        kind = names.get(key)
        for part, name in (("lora_A", "dA"), ("lora_B", "dB"), ("magn", "dm")):
            kind = kind or (name if part in key else None)
        found.setdefault(kind or key, []).append((key, results[key]))
    return found


def agree_all(mine, theirs, tolerance=1e-5):
    if set(mine) != set(theirs):
        raise Wrong(f"results {sorted(set(mine) ^ set(theirs))[:4]} on one side only")
    names, a, b = [], [], []
    for kind, items in kinds(mine).items():
        for key, value in items:
            names.append(kind)
            a.append(value)
            b.append(theirs[key])
    return agree(a, b, names, tolerance)


class Layer:
    """One linear map with its tensors, HF's adapted layer around it, and the
    ways of libpeft to run it."""

    def __init__(self, inputs, outputs, r, n, dropout=0.0, dora=False,
                 adapters=("default",), bias=True, device="cpu", dtype=torch.float32):
        inputs, outputs = small(inputs, 64), small(outputs, 96)
        n = small(n, 16)
        where = dict(device=device, dtype=dtype)
        torch.manual_seed(0)
        self.r, self.alpha, self.dropout = r, 2.0 * r, dropout
        self.weight = torch.randn(outputs, inputs, **where) / math.sqrt(inputs)
        self.bias = torch.randn(outputs, **where) if bias else None
        self.x = torch.randn(n, inputs, **where).requires_grad_()
        self.dy = torch.randn(n, outputs, **where)
        host = torch.nn.Module()
        host.layer = torch.nn.Linear(inputs, outputs, bias=bias, **where)
        host.layer.weight.data = self.weight
        if bias:
            host.layer.bias.data = self.bias
        settings = hf_settings(r, self.alpha, dropout, dora)
        self.model = peft.get_peft_model(
            host, settings, adapter_name=adapters[0], autocast_adapter_dtype=False)
        for name in adapters[1:]:
            self.model.add_adapter(name, settings, autocast_adapter_dtype=False)
        self.layer = self.model.base_model.model.layer
        self.tensors = hf_tensors(
            self.model, adapters[0], "base_model.model.layer.")
        self.by_adapter = {
            name: hf_tensors(self.model, name, "base_model.model.layer.")
            for name in adapters}
        for tensors in self.by_adapter.values():
            fill(tensors)
        self.settings = ours.Settings(r, self.alpha, dropout, dora)

    def hf_step(self):
        self.x.grad = None
        for p in self.tensors.values():
            p.grad = None
        y = self.layer(self.x)
        y.backward(self.dy)
        return y

    def hf_results(self):
        y = self.hf_step()
        grads = {key: p.grad for key, p in self.tensors.items()}
        return {"y": y.detach(), "x": self.x.grad, **grads}

    def base(self):
        return ours.frozen_linear(self.x, self.dy, self.weight, self.bias)

    def attached(self, packed=False):
        return ours.attached_linear(
            self.x, self.dy, self.weight, self.bias, self.settings,
            shared(self.tensors), packed)

    def function(self):
        A, B = (self.tensors[f"lora_{i}.weight"] for i in "AB")
        return ours.functional_linear(
            self.x, self.dy, self.weight, self.bias, A.detach().requires_grad_(),
            B.detach().requires_grad_(), self.alpha / self.r, self.dropout)


def check_dropout(run, layer):
    """Recovers the mask of a dropout step from dx and recomputes all the rest by
    it. Every tensor is positive, so dx tells kept from dropped."""
    got = run.results()
    p, s = layer.dropout, layer.alpha / layer.r
    x, dy, W, b = (t.detach().double() for t in (layer.x, layer.dy, layer.weight, layer.bias))
    A, B = (layer.tensors[f"lora_{i}.weight"].detach().double() for i in "AB")
    dt = s * dy @ B
    kept = ((got["x"].double() - dy @ W) / (dt @ A) > 0.5 / (1 - p)).double()
    if abs(kept.mean() - (1 - p)) > 5 * math.sqrt(p * (1 - p) / kept.numel()):
        raise Wrong(f"dropout keeps {kept.mean():.4f}, not {1 - p}")
    mask = kept / (1 - p)
    t = (x * mask) @ A.T
    expected = {
        "y": x @ W.T + b + s * t @ B.T,
        "x": dy @ W + (dt @ A) * mask,
        "lora_A.weight": dt.T @ (x * mask),
        "lora_B.weight": s * dy.T @ t}
    return agree_all(got, expected)


# Layer steps.


def step(inputs, outputs, r, n, dropout=0.0, dora=False, kind="attached"):
    def make():
        layer = Layer(inputs, outputs, r, n, dropout, dora)
        run = {
            "attached": layer.attached,
            "packed": lambda: layer.attached(packed=True),
            "function": layer.function}[kind]()
        if dropout:
            positive = Layer(inputs, outputs, r, 64, dropout, dora)
            with torch.no_grad():
                for t in (positive.x, positive.dy, positive.weight, *positive.tensors.values()):
                    t.abs_()
            check = lambda: check_dropout(positive.attached(), positive)
        else:
            check = lambda: agree_all(run.results(), layer.hf_results())
        return Trial(
            {"HF": repeated(layer.hf_step), "ours": looped(run.train),
             "base": looped(layer.base().train)},
            check)

    return make


def on_gpu():
    def make():
        if not torch.cuda.is_available():
            return Trial(notes=["not measured: no GPU here"])
        layer = Layer(4096, 4096, 16, 8192, device="cuda", dtype=torch.bfloat16)
        run, base = layer.attached(), layer.base()

        def timed(steps):
            def variant(n):
                torch.cuda.synchronize()
                start = time.perf_counter()
                steps(n)
                torch.cuda.synchronize()
                return time.perf_counter() - start
            return variant

        def hf(n):
            for _ in range(n):
                layer.hf_step()

        return Trial(
            {"HF": timed(hf), "ours": timed(run.train), "base": timed(base.train)},
            lambda: agree_all(run.results(), layer.hf_results(), tolerance=2e-2),
            notes=[f"wall time on {torch.cuda.get_device_name()}"])

    return make


# Inference.


def without_gradients(step):
    def run():
        with torch.no_grad():
            step()

    return run


def unmerged(n):
    def make():
        layer = Layer(768, 768, 8, n)
        layer.model.eval()
        run, base = layer.attached(), layer.base()

        def check():
            with torch.no_grad():
                return agree([run.forward()], [layer.layer(layer.x)], ["y"])

        return Trial(
            {"HF": repeated(without_gradients(lambda: layer.layer(layer.x))),
             "ours": looped(run.infer), "base": looped(base.infer)},
            check)

    return make


def merged(n):
    def make():
        layer = Layer(768, 768, 8, n)
        weight = layer.weight.clone()
        layer.model.eval()
        layer.layer.merge()
        run = ours.merged_linear(
            layer.x, weight, layer.bias, layer.settings, shared(layer.tensors))
        plain = ours.plain_linear(layer.x, weight, layer.bias)

        def operators(which):
            account = ours.Account()
            with torch.no_grad():
                which.forward()
            account.stop()
            return account.operators

        def check():
            with torch.no_grad():
                return agree([run.forward()], [layer.layer(layer.x)], ["y"])

        of_ours, of_base = operators(run), operators(plain)
        return Trial(
            {"HF": repeated(without_gradients(lambda: layer.layer(layer.x))),
             "ours": looped(run.infer), "base": looped(plain.infer)},
            check,
            exact={"operators that differ": float(of_ours != of_base)},
            notes=[f"operators of ours: {', '.join(of_ours)}; of a torch::nn::Linear "
                   f"that never had an adapter: {', '.join(of_base)}"])

    return make


def mixed(rows, adapters):
    def make():
        names = [f"a{i}" for i in range(adapters)]
        layer = Layer(768, 768, 8, rows, adapters=names)
        layer.model.eval()
        of_row = [names[i % adapters] for i in range(rows)]
        x = torch.randn(rows, 1, layer.weight.shape[1])
        run = ours.mixed_linear(
            x, layer.weight, layer.bias, layer.settings,
            {name: shared(t) for name, t in layer.by_adapter.items()}, of_row)
        base = ours.frozen_linear(x, None, layer.weight, layer.bias)
        hf = lambda: layer.layer(x, adapter_names=of_row)

        def check():
            with torch.no_grad():
                return agree([run.forward()], [hf()], ["y"])

        return Trial(
            {"HF": repeated(without_gradients(hf)), "ours": looped(run.infer),
             "base": looped(base.infer)},
            check)

    return make


# The encoder.


class Encoder:
    """Four BERT-base layers over 8 x 128 hidden states."""

    def __init__(self, dropout, training=True):
        import transformers

        torch.manual_seed(0)
        hidden, heads, layers = (64, 4, 1) if QUICK else (768, 12, 4)
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=hidden, num_attention_heads=heads,
            num_hidden_layers=layers, intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        frozen = transformers.BertModel(config, add_pooling_layer=False).encoder
        weights = {key: p.detach() for key, p in frozen.named_parameters()}
        batch, length = (2, 8) if QUICK else (8, 128)
        self.x = torch.randn(batch, length, hidden).requires_grad_()
        self.dy = torch.randn(batch, length, hidden)
        self.model = peft.get_peft_model(
            frozen,
            hf_settings(8, 16.0, dropout, targets=("query", "key", "value", "dense")),
            autocast_adapter_dtype=False)
        self.model.train(training)
        self.tensors = hf_tensors(self.model)
        fill(self.tensors)
        self.encoder = self.model.base_model.model

        def build(settings, train):
            return ours.encoder(
                self.x, self.dy, heads, layers, weights, settings,
                shared(self.tensors), train)

        self.run = build(ours.Settings(8, 16.0, dropout), training)
        self.base = build(None, training)
        self.evaluated = build(ours.Settings(8, 16.0, dropout), False)

    def forward(self):
        return self.encoder(self.x).last_hidden_state

    def drop_gradients(self):
        self.x.grad = None
        for p in self.tensors.values():
            p.grad = None

    def hf_step(self):
        self.drop_gradients()
        y = self.forward()
        y.backward(self.dy)
        return y

    def check(self):
        """With dropout off on both sides: the masks are not the same."""
        was = self.model.training
        self.model.eval()
        y = self.hf_step()
        self.model.train(was)
        theirs = {"y": y.detach(), "x": self.x.grad,
                  **{key: p.grad for key, p in self.tensors.items()}}
        return agree_all(self.evaluated.results(), theirs)


def encoder_step(dropout):
    def make():
        both = Encoder(dropout)
        return Trial(
            {"HF": repeated(both.hf_step), "ours": looped(both.run.train),
             "base": looped(both.base.train)},
            both.check)

    return make


def encoder_inference():
    def make():
        both = Encoder(0.0, training=False)
        return Trial(
            {"HF": repeated(without_gradients(both.forward)),
             "ours": looped(both.run.infer), "base": looped(both.base.infer)},
            both.check)

    return make


@functools.lru_cache(maxsize=1)
def checked_encoder(dropout):
    """For the rows that count: made and compared once."""
    both = Encoder(dropout)
    return both, both.check()


def memory(dropout, what):
    def make():
        both, errors = checked_encoder(dropout)
        steps = {
            "HF": (both, both.hf_step),
            "ours": (both.run, lambda: both.run.train(1)),
            "base": (both.base, lambda: both.base.train(1))}
        found = {}
        for name, (side, whole) in steps.items():
            whole()  # what is made once is there
            side.drop_gradients()
            if what == "held":
                account = ours.Account()
                y = side.forward()
                found[name] = account.held
                account.stop()
                del y
            else:
                account = ours.Account()
                whole()
                account.stop()
                found[name] = {
                    "allocated": account.allocated,
                    "peak": account.peak,
                    "operators": len(account.operators)}[what]
        unit = 1 if what == "operators" else 2**20
        text = ", ".join(
            f"{name} {value / unit:,.{0 if unit == 1 else 1}f}"
            for name, value in found.items())
        return Trial(
            exact={"HF/ours": found["HF"] / found["ours"],
                   "ours/base": found["ours"] / found["base"],
                   "HF/base": found["HF"] / found["base"]},
            check=lambda: errors,
            notes=[text + ("" if unit == 1 else " MiB")])

    return make


# Merging and files.


def merge(width, r, in_place):
    def make():
        layer = Layer(width, width, r, 1, bias=False)
        start_weight = layer.weight.clone()
        tensors = shared(layer.tensors)
        streamed = layer.weight.clone()

        def hf(n):
            watch = Watch(ours.set_timed)
            for _ in range(n):
                with watch:
                    layer.layer.merge()
                layer.layer.unmerge()
            return watch.seconds

        def mine(n):
            return ours.merge_linear(
                start_weight, layer.settings, tensors, in_place, n)[0]

        def stream():
            streamed.mul_(1.0000001)

        def check():
            layer.weight.copy_(start_weight)
            layer.layer.merge()
            theirs = layer.layer.get_base_layer().weight.detach().clone()
            layer.layer.unmerge()
            mine = ours.merge_linear(
                start_weight, layer.settings, tensors, in_place, 1)[1]
            return agree([mine], [theirs], ["W"])

        return Trial(
            {"HF": hf, "ours": mine, "base": repeated(stream)}, check,
            repeats=None if width < 2000 else 2)

    return make


class Adapted:
    """BERT-base with an adapter of 5 MB, in memory and in a folder."""

    kept = None

    def __init__(self):
        import transformers

        hidden, heads, layers = (64, 4, 2) if QUICK else (768, 12, 12)
        config = transformers.BertConfig(
            vocab_size=100, hidden_size=hidden, num_attention_heads=heads,
            num_hidden_layers=layers, intermediate_size=4 * hidden)
        self.folder = tempfile.mkdtemp(prefix="peft-compare-")
        self.hf_folder = os.path.join(self.folder, "hf")
        self.our_folder = os.path.join(self.folder, "ours")
        self.network = transformers.BertModel(config, add_pooling_layer=False)
        self.model = peft.get_peft_model(
            self.network,
            hf_settings(8, 16.0, targets=("query", "key", "value", "dense")))
        fill(hf_tensors(self.model))
        self.model.save_pretrained(self.hf_folder)
        self.files = ours.Files(hidden, heads, layers)

    def __del__(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self):
        """Both sides wrote the same numbers under the same names."""
        from safetensors.torch import load_file

        self.files.save(self.hf_folder, self.our_folder, 1)
        theirs, mine = (
            load_file(os.path.join(f, "adapter_model.safetensors"))
            for f in (self.hf_folder, self.our_folder))
        return {"file": max(agree_all(mine, theirs, tolerance=0.0).values())}


def save():
    def make():
        both = Adapted()
        again = os.path.join(both.folder, "again")
        return Trial(
            {"HF": repeated(lambda: both.model.save_pretrained(again)),
             "ours": lambda n: both.files.save(both.hf_folder, both.our_folder, n)},
            both.check)

    return make


def load():
    def make():
        both = Adapted()
        both.model.unload()

        def hf(n):
            watch = Watch(ours.set_timed)
            for _ in range(n):
                with watch:
                    model = peft.PeftModel.from_pretrained(both.network, both.hf_folder)
                model.unload()
            return watch.seconds

        return Trial(
            {"HF": hf, "ours": lambda n: both.files.load(both.hf_folder, n)},
            both.check)

    return make


def start_up(program):
    def make():
        if not program:
            raise Wrong("the start-up program was not given: --startup FILE")

        def child(command):
            def run(n):
                seconds = 0.0
                for _ in range(n):
                    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = status
                    if status:
                        raise Wrong(f"{command} ended with status {status}")
                    seconds += usage.ru_utime + usage.ru_stime
                return seconds
            return run

        return Trial(
            {"HF": child([sys.executable, "-c", "import peft"]),
             "ours": child([program]),
             "base": child([program, "base"])},
            repeats=1, rounds=1 if QUICK else 15)

    return make


ABOUT = {
    "Training step of a layer":
        "Gradients dropped, forward, backward from a random dy; the gradients are "
        "those of x, A and B. Ours is a `torch::nn::Linear` with an adapter attached; "
        "\"the function alone\" is `peft::functional::lora_linear`; \"packed\" is "
        "after `peft::pack_frozen`.",
    "Training step of a layer, DoRA": "The gradient of the magnitude is among them.",
    "Encoder, 4 layers of BERT-base, 8 × 128":
        "8 sequences of 128 tokens; LoRA r 8 on query, key, value and the three dense "
        "maps of each layer; no dropout but LoRA's. HF's is transformers' `BertModel`, "
        "ours and the base `peft::models::BertModel`, all on the same weights. Bytes "
        "and operators are LibTorch's own reports, for both sides alike.",
    "Inference, 768 → 768, r 8":
        "Without gradients. HF's mixed batch is `adapter_names`, ours "
        "`peft::BatchAdapters`; the base has no adapter at all.",
    "Merging, files, start":
        "\"merge\" is `peft::merge(model)`, for good; \"that can be undone\" is "
        "`adapter.merge()`, which keeps the old base for an exact `unmerge()`; HF's is "
        "the layer's `merge()` in both rows. Files: BERT-base, 12 layers, 144 tensors, "
        "from and to the page cache; `save_pretrained` and `from_pretrained` against "
        "`peft::save` and `peft::load`.",
}


def table(startup=None):
    """All rows, in the order of the table."""
    rows = []

    def add(group, name, make, *targets, cost=2.0, profiled=True):
        rows.append(Row(group, name, make, list(targets), cost, profiled))

    layer = "Training step of a layer"
    of_n = {
        1: [at_least(2.3)],
        16: [at_most(1.08), at_least(2.1)],
        32: [at_most(1.08)],
        64: [at_most(1.08)],
        128: [at_most(1.08), at_least(1.4)],
        512: [],
        1024: [at_most(1.06), at_least(1.45)],
        4096: [at_most(1.06), at_least(1.45)]}
    for n, targets in of_n.items():
        add(layer, f"768 → 768, r 8, N {n}", step(768, 768, 8, n), *targets,
            cost=1 + n / 500)
    for n in (1, 16):
        add(layer, f"768 → 768, r 8, N {n}, the function alone",
            step(768, 768, 8, n, kind="function"))
    add(layer, "768 → 768, r 8, N 16, packed", step(768, 768, 8, 16, kind="packed"),
        at_most(0.85), at_least(3.0))
    add(layer, "768 → 768, r 8, N 128, packed", step(768, 768, 8, 128, kind="packed"))
    add(layer, "768 → 768, r 16, N 1024", step(768, 768, 16, 1024), cost=3)
    add(layer, "768 → 3072, r 8, N 1024", step(768, 3072, 8, 1024), at_most(1.04),
        cost=8)
    add(layer, "3072 → 768, r 8, N 1024", step(3072, 768, 8, 1024), cost=8)
    for n in (1, 16, 128):
        add(layer, f"4096 → 4096, r 16, N {n}", step(4096, 4096, 16, n),
            cost=3 + n / 16)

    drop = "Training step of a layer, dropout 0.1"
    for n in (128, 1024):
        add(drop, f"768 → 768, r 8, N {n}", step(768, 768, 8, n, dropout=0.1),
            at_least(1.8), cost=1 + n / 350)

    dora = "Training step of a layer, DoRA"
    for n, least in ((128, 3.0), (1024, 1.9)):
        add(dora, f"768 → 768, r 8, N {n}", step(768, 768, 8, n, dora=True),
            at_least(least), cost=1 + n / 250)

    encoder = "Encoder, 4 layers of BERT-base, 8 × 128"
    add(encoder, "training step", encoder_step(0.0), at_most(1.06), at_least(1.30),
        cost=90)
    add(encoder, "training step, dropout 0.1", encoder_step(0.1), at_least(1.45),
        cost=100)
    add(encoder, "unmerged inference", encoder_inference(), cost=40)
    add(encoder, "bytes held after the forward", memory(0.0, "held"), at_least(1.0),
        cost=8)
    add(encoder, "bytes allocated in a step", memory(0.0, "allocated"),
        at_most(1.01), cost=4)
    add(encoder, "most bytes at a time", memory(0.0, "peak"), cost=4)
    add(encoder, "operators dispatched in a step", memory(0.0, "operators"), cost=4)
    add(encoder, "bytes held after the forward, dropout 0.1", memory(0.1, "held"),
        at_least(1.75), cost=8)
    add(encoder, "bytes allocated in a step, dropout 0.1", memory(0.1, "allocated"),
        cost=4)

    inference = "Inference, 768 → 768, r 8"
    add(inference, "unmerged, N 1", unmerged(1), at_most(1.05))
    add(inference, "unmerged, N 1024", unmerged(1024), at_most(1.04))
    same = Target("operators that differ", "<=", 0, "the same operators")
    add(inference, "merged, N 1", merged(1), same)
    add(inference, "merged, N 1024", merged(1024), same)
    for n, adapters in ((8, 4), (8, 8), (64, 32)):
        add(inference, f"{n} rows, {adapters} adapters in one batch",
            mixed(n, adapters), at_least(4.5), at_most(1.15))

    files = "Merging, files, start"
    add(files, "merge, 768, r 8 (base: W times a constant)", merge(768, 8, True),
        at_least(8.5))
    add(files, "merge, 4096, r 16 (base: W times a constant)", merge(4096, 16, True),
        at_least(10), at_most(1.1), cost=12)
    add(files, "merge that can be undone, 768, r 8", merge(768, 8, False))
    add(files, "merge that can be undone, 4096, r 16", merge(4096, 16, False), cost=12)
    add(files, "save an adapter of 5 MB", save(), at_least(6), cost=6)
    add(files, "load an adapter of 5 MB", load(), at_least(50), cost=10)
    add(files, "start-up (HF: import peft)", start_up(startup), at_least(14),
        cost=90, profiled=False)

    add("GPU, bfloat16", "4096 → 4096, r 16, 8192 tokens", on_gpu(), at_most(1.03),
        at_least(1.25), profiled=False)
    return rows
