"""The table of docs/hf_peft.md: every tuner on every kind of layer, in libpeft and in HF PEFT.

    pip install -r requirements.txt
    python make_table.py cases [TUNER ...] # data/table: PEFT's files and numbers, and how PEFT does
    PEFT_TABLE_RESULTS=ours.json ctest -R test_hf_table   # how libpeft does
    python make_table.py found             # data/table/found_*: what random cases once found
    python make_table.py write ours.json   # both into docs/hf_peft.md

A case is one adapted layer with a linear head behind it, in the form of fuzz_with_peft.py.
"""

import copy
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import fuzz_with_peft as fuzz
import peft
import torch
from peft.tuners import lora
from torch import nn

DATA = Path(__file__).resolve().parent / "data" / "table"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "hf_peft.md"
BEGIN, END = "<!-- made by tests/golden/make_table.py -->", "<!-- end of what it makes -->"

FEATURES = ["forward", "gradient", "disable", "merge", "unmerge", "several", "mixed batch", "files"]


def conv(kind, **changes):
    dims = int(kind[4])
    plain = dict(
        kind=kind, name="layer", kernel=[3] * dims, stride=[1] * dims, padding=[1] * dims,
        dilation=[1] * dims, groups=1, bias=True, padding_mode="zeros",
    )
    return {"in": 4, "out": 6, **plain, **changes}


def linear(width):
    return {"kind": "linear", "name": "head", "in": width, "out": 3, "bias": True, "last": True}


LAYERS = {
    "Linear": ([{"kind": "linear", "name": "layer", "in": 6, "out": 4, "bias": True}, linear(4)], [4, 6]),
    "Linear without bias": (
        [{"kind": "linear", "name": "layer", "in": 6, "out": 4, "bias": False}, linear(4)], [4, 6]),
    "Conv1D of GPT-2": ([{"kind": "hf_conv1d", "name": "layer", "in": 6, "out": 4}, linear(4)], [4, 6]),
    "Conv1d": ([conv("conv1d"), dict(kind="flatten"), linear(30)], [4, 4, 5]),
    "Conv2d 1x1": ([conv("conv2d", kernel=[1, 1], padding=[0, 0]), dict(kind="flatten"), linear(96)], [4, 4, 4, 4]),
    "Conv2d": ([conv("conv2d"), dict(kind="flatten"), linear(96)], [4, 4, 4, 4]),
    "Conv2d, dilated": (
        [conv("conv2d", dilation=[2, 2], padding=[2, 2]), dict(kind="flatten"), linear(96)], [4, 4, 4, 4]),
    "Conv2d, circular": (
        [conv("conv2d", padding_mode="circular"), dict(kind="flatten"), linear(96)], [4, 4, 4, 4]),
    "Conv2d, 2 groups": ([conv("conv2d", groups=2), dict(kind="flatten"), linear(96)], [4, 4, 4, 4]),
    "Conv3d": ([conv("conv3d", kernel=[2] * 3, padding=[0] * 3), dict(kind="flatten"), linear(48)], [4, 4, 3, 3, 3]),
    "Embedding": ([{"kind": "embedding", "name": "layer", "rows": 9, "width": 6}, linear(6)], [4, 3]),
    "MultiheadAttention": (
        [{"kind": "mha", "name": "layer", "width": 8, "heads": 2, "bias": True, "sequence_first": True},
         linear(8)], [3, 4, 8]),
    "LayerNorm": ([{"kind": "layernorm", "name": "layer", "width": 6}, linear(6)], [4, 6]),
}
HERE = dict(target_modules=["layer"])
TUNERS = {
    "LoRA": ("Lora", dict(r=2, lora_alpha=4)),
    "LoRA, rsLoRA": ("Lora", dict(r=2, lora_alpha=4, use_rslora=True)),
    "LoRA, lora_bias": ("Lora", dict(r=2, lora_alpha=4, lora_bias=True)),
    'LoRA, bias="all"': ("Lora", dict(r=2, lora_alpha=4, bias="all")),
    "LoRA, PiSSA": ("Lora", dict(r=2, lora_alpha=4, init_lora_weights="pissa")),
    "LoRA, OLoRA": ("Lora", dict(r=2, lora_alpha=4, init_lora_weights="olora")),
    "LoRA, orthogonal": ("Lora", dict(r=2, lora_alpha=4, init_lora_weights="orthogonal")),
    "LoRA, KaSA": ("Lora", dict(r=2, lora_alpha=4, kasa_config=lora.KasaConfig())),
    "LoRA, BD-LoRA": (
        "Lora", dict(r=2, lora_alpha=4, use_bdlora=lora.BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2))),
    "LoRA, MonteCLoRA": (
        "Lora", dict(r=2, lora_alpha=4, monteclora_config=lora.MontecloraConfig(num_samples=2, buffer_size=4))),
    "LoRA, VeLoRA": ("Lora", dict(r=2, lora_alpha=4, velora_config=lora.VeloraConfig(num_groups=3))),
    "DoRA": ("Lora", dict(r=2, lora_alpha=4, use_dora=True)),
    "AdaLoRA": ("AdaLora", dict(init_r=2, target_r=1, lora_alpha=4, total_step=100, tinit=10, tfinal=20)),
    "VeRA": ("Vera", dict(r=3)),
    # Logits so far apart that finite differences do not change which are the largest.
    "VB-LoRA": ("VBLoRA", dict(r=2, num_vectors=5, vector_length=2, init_logits_std=0.5)),
    "LoHa": ("LoHa", dict(r=2, alpha=4)),
    "LoHa, use_effective_conv2d": ("LoHa", dict(r=2, alpha=4, use_effective_conv2d=True)),
    "LoKr": ("LoKr", dict(r=1, alpha=4)),
    "OFT": ("OFT", dict(oft_block_size=2)),
    "BOFT": ("BOFT", dict(boft_block_size=2)),
    "HRA": ("HRA", dict(r=2)),
    "FourierFT": ("FourierFT", dict(n_frequency=6, scaling=10.0)),
    "(IA)³": ("IA3", dict(feedforward_modules=[])),
    "(IA)³, feed-forward": ("IA3", dict(feedforward_modules=["layer"])),
    "LayerNorm tuning": ("LNTuning", {}),
    "trainable tokens": ("TrainableTokens", dict(token_indices=[1, 4])),
    "BEFT": ("Beft", {}),
    "SHiRA": ("Shira", dict(r=1, random_seed=3)),
}


# What differs from plain LoRA on these alone, or is shown by them.
SOME_LAYERS = {
    "LoRA, rsLoRA": ["Linear", "Conv2d"],
    "LoRA, lora_bias": ["Linear", "Conv2d"],
    'LoRA, bias="all"': ["Linear", "MultiheadAttention"],
    "LoRA, PiSSA": ["Linear", "Conv1D of GPT-2"],
    "LoRA, OLoRA": ["Linear"],
    "LoRA, orthogonal": ["Linear", "Conv1D of GPT-2"],
    "LoRA, KaSA": ["Linear"],
    "LoRA, BD-LoRA": ["Linear"],
    "LoRA, MonteCLoRA": ["Linear", "Conv1D of GPT-2"],
    "LoRA, VeLoRA": ["Linear", "Conv1D of GPT-2"],
    "BEFT": ["Linear", "Linear without bias"],
    "SHiRA": ["Linear"],
}


# What random cases once found; no rows of the table.
FOUND = {
    "found_lokr_rank_dropout": dict(
        tuner="LoKr", fields=dict(r=1, alpha=4, rank_dropout=0.3), layer="Linear", train=True),
    "found_vera_dropout_vector": dict(
        tuner="Vera", fields=dict(r=3, vera_dropout=0.3), layer="Linear", train=True, shape=[6]),
    "found_ada_lora_dropout_conv": dict(
        tuner="AdaLora", fields={**TUNERS["AdaLoRA"][1], "lora_dropout": 0.3}, layer="Conv2d", train=True),
    "found_fourier_ft_pattern": dict(
        tuner="FourierFT", fields=dict(n_frequency=6, n_frequency_pattern={"^layer": 3}), layer="Linear"),
    "found_loha_start_bfloat16": dict(
        tuner="LoHa", fields=dict(r=2), layer="Linear", dtype=torch.bfloat16),
    "found_ia3_start_float64": dict(
        tuner="IA3", fields=dict(feedforward_modules=[], init_ia3_weights=False), layer="Linear",
        dtype=torch.float64),
}


def slug(text):
    keep = "".join(c if c.isalnum() else "_" for c in text.lower().replace("³", "3"))
    return "_".join(filter(None, keep.split("_")))


class FixedCase(fuzz.Case):
    def __init__(self, tuner, fields, layer, dtype=torch.float32, train=False, shape=None):
        self.tuner = tuner
        self.layers, self.shape = copy.deepcopy(LAYERS[layer])
        self.shape = shape or self.shape
        self.fields = {**fields, **HERE}
        if self.layers[0]["kind"] == "hf_conv1d" and self.tuner not in ("LNTuning", "LoHa", "LoKr", "HRA"):
            self.fields["fan_in_fan_out"] = True
        self.adapted = {"layer": self.layers[0]}
        self.trust = fuzz.trusted(self.tuner, self.fields, self.adapted)
        self.seed, self.dtype, self.rng = 3, dtype, random.Random(3)
        self.train, self.name, self.optimizer = train, "default", "sgd"
        self.edit, self.has_second = "", False


def relative(left, right):
    return ((left.double() - right.double()).abs().max() / right.double().abs().max()).item()


class Answers:
    """How PEFT does with one case: for each feature "" or what is wrong."""

    def __init__(self, case, folder):
        self.case, self.saved = case, folder
        self.x = fuzz.draw_input(case.rng, case.layers, case.shape, case.dtype, case.seed)

    def load(self, dtype=None, name="default"):
        network = self.case.network()
        model = peft.PeftModel.from_pretrained(network, self.saved, adapter_name=name, is_trainable=True)
        return (model.to(dtype) if dtype else model).eval()

    def wide(self):
        return self.x.double() if self.x.is_floating_point() else self.x

    def forward(self):
        # The equations' output where there is one, else that of the merged network.
        output = self.load(torch.float64)(self.wide())
        if self.case.trust == "equations" or self.case.trust is None:
            target = torch.zeros_like(output)
            exact, _ = self.case.equations(self.saved, self.wide(), target, torch.float64)
            apart = relative(output, exact["output"])
        else:
            try:
                merged = self.load(torch.float64).merge_and_unload()
            except (NotImplementedError, ValueError):
                return ""
            apart = relative(output, merged(self.wide()))
        return "" if apart < 1e-6 else f"off by {apart:.0%}"

    def gradient(self):
        if self.case.fields.get("use_dora"):
            return ""  # its norm is held fixed on purpose
        model = self.load(torch.float64)
        parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(5)
        loss = lambda: model(self.wide()).square().sum()
        loss().backward()
        worst = 0.0
        for p in parameters:
            if p.numel() == 0 or p.grad is None:
                continue
            way = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            with torch.no_grad():
                step = 1e-2  # FourierFT computes in float32 whatever the network's type
                p.add_(step * way)
                up = loss().item()
                p.sub_(2 * step * way)
                down = loss().item()
                p.add_(step * way)
            numeric = (up - down) / (2 * step)
            worst = max(worst, abs(numeric - (p.grad * way).sum().item()) / max(0.1, abs(numeric)))
        return "" if worst < 2e-2 else "wrong"

    def disable(self):
        model = self.load()
        with torch.no_grad():
            with model.disable_adapter():
                off = model(self.x)
            return "" if torch.equal(off, self.case.network()(self.x)) else "not the base"

    def merge(self):
        with torch.no_grad():
            model = self.load()
            before = model(self.x)
            apart = relative(model.merge_and_unload()(self.x), before)
        return "" if apart < 1e-5 else f"off by {apart:.0%}"

    def unmerge(self):
        case = copy.copy(self.case)
        case.dtype = torch.bfloat16
        network = case.network()
        base = {k: v.detach().clone() for k, v in network.named_parameters()}
        model = peft.PeftModel.from_pretrained(network, self.saved).eval()
        model.merge_adapter()
        model.unmerge_adapter()
        now = {k.replace("base_layer.", ""): v for k, v in model.base_model.model.named_parameters()}
        return "" if all(torch.equal(now[k], v) for k, v in base.items()) else "changes the base"

    def several(self):
        with torch.no_grad():
            model = self.load()
            alone = model(self.x)
            model.load_adapter(self.saved, "two")
            model.base_model.set_adapter(["default", "two"])
            both = model(self.x)
        return "" if not torch.equal(both, alone) else "one only"

    def mixed(self):
        dim = 1 if any("sequence_first" in l for l in self.case.layers) else 0
        names = ["default" if i % 2 == 0 else "__base__" for i in range(self.x.shape[dim])]
        with torch.no_grad():
            model = self.load()
            alone = model(self.x).clone()
            base = self.case.network()(self.x)
            for i in range(1, len(names), 2):
                alone.select(dim, i).copy_(base.select(dim, i))
            apart = relative(model(self.x, adapter_names=names), alone)
        return "" if apart < 1e-5 else f"off by {apart:.0%}"

    def files(self):
        self.load()
        return ""

    def all(self):
        result = {}
        for feature in FEATURES:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result[feature] = getattr(self, feature.split()[0])()
            except Exception as error:
                result[feature] = type(error).__name__
        return result


def write_cases(chosen):
    """Those of the `chosen` tuners; without any, all of the folder anew."""
    if not chosen:
        shutil.rmtree(DATA, ignore_errors=True)
    known = {} if not chosen else {
        (row["tuner"], row["layer"]): row for row in json.loads((DATA / "peft.json").read_text())}
    answers = []
    for tuner in TUNERS:
        for layer in LAYERS:
            if (TUNERS[tuner][0] == "LNTuning") != (layer == "LayerNorm"):
                continue  # PEFT copies any module whole there; the norm is what it is for
            if layer not in SOME_LAYERS.get(tuner, [l for l in LAYERS if l != "Linear without bias"]):
                continue
            if "effective" in tuner and not layer.startswith("Conv"):
                continue
            if chosen and tuner not in chosen:
                answers.append(known[tuner, layer])
                continue
            case = FixedCase(*TUNERS[tuner], layer)
            name = slug(f"{tuner} on {layer}")
            row = {"tuner": tuner, "layer": layer, "case": name}
            shutil.rmtree(DATA / name, ignore_errors=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    folder = write_case(case, name)
                    row["peft"] = Answers(case, folder / "adapter").all()
            except Exception as error:
                shutil.rmtree(DATA / name, ignore_errors=True)
                row["peft"] = {"no": type(error).__name__, "why": str(error)[:160]}
            answers.append(row)
            print(f"{tuner:28s} {layer:20s}", row["peft"])
    if not chosen:
        write_found()
    (DATA / "peft.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")


def write_found():
    for name, given in FOUND.items():
        shutil.rmtree(DATA / name, ignore_errors=True)
        write_case(FixedCase(**given), name)


def write_case(case, name):
    written = case.write(DATA)
    folder = DATA / name
    written.rename(folder)
    numbers = fuzz.load_file(folder / "expected.safetensors")
    fuzz.save_file(
        {k: v for k, v in numbers.items() if not k.startswith("exact.")}, folder / "expected.safetensors")
    return folder


# ---- The document ---------------------------------------------------------------------------


def in_words(results):
    """One cell: what works, and what does not and why."""
    lacking = [f"{f} ({why})" if why else f for f, why in results.items() if why]
    if not lacking:
        return "all"
    if len(lacking) == len(results):
        return "nothing: " + "; ".join(sorted(set(results.values())))
    return "all but " + ", ".join(lacking)


def write_document(ours):
    ours = json.loads(Path(ours).read_text())
    rows = ["| tuner | layer | libpeft | HF PEFT 0.21.2 |", "|---|---|---|---|"]
    for row in json.loads((DATA / "peft.json").read_text()):
        if "no" in row["peft"]:
            continue
        mine = ours.get(row["case"])
        mine = in_words({f: mine[f] for f in FEATURES}) if mine else "not tested"
        rows.append(f"| {row['tuner']} | {row['layer']} | {mine} | {in_words(row['peft'])} |")
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + after)
    print(f"{len(rows) - 2} rows in {DOCUMENT}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["cases"]:
        write_cases(sys.argv[2:])
    elif sys.argv[1:] == ["found"]:
        write_found()
    else:
        assert sys.argv[1] == "write", __doc__
        write_document(sys.argv[2])
