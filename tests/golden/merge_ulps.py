"""How far PEFT's merged weights lie from the float64 result.

    python merge_ulps.py

Prints, for each tuner and dtype, the largest distance in units in the last place
of the result, and the share of the weights that lie more than one away: after a
merge, after a safe merge, and after a merge into weights that nearly cancel with
the change. LoRA, LoHa, LoKr and VeRA change a weight by about a hundredth of its
size. libpeft stays within one unit in all of them (tests/test_merge_precision.cpp).
"""

import copy

import peft
import torch

DIGITS = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}


def ulps(merged, exact):
    digits, least = DIGITS[merged.dtype]
    exponent = torch.frexp(exact).exponent.double() - digits
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp_min(least))
    return (merged.double() - exact).abs() / unit


def tuners():
    names = ["linear"]
    yield "LoRA", peft.LoraConfig(r=8, target_modules=names, init_lora_weights=False)
    yield "DoRA", peft.LoraConfig(
        r=8, target_modules=names, init_lora_weights=False, use_dora=True)
    yield "LoHa", peft.LoHaConfig(r=8, target_modules=names, init_weights=False)
    yield "LoKr", peft.LoKrConfig(r=8, target_modules=names, init_weights=False)
    yield "VeRA", peft.VeraConfig(r=256, target_modules=names, init_weights=False)
    yield "OFT", peft.OFTConfig(oft_block_size=32, target_modules=names, init_weights=False)
    yield "HRA", peft.HRAConfig(r=8, target_modules=names, init_weights=False)


def shrink(layer, name):
    """Scales what the adapter adds to about a hundredth of the weights."""
    with torch.no_grad():
        moved = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else None
        if name in ("OFT", "HRA", "DoRA") or moved is None:
            return
        factor = 0.01 * layer.get_base_layer().weight.float().std() / moved.float().std()
        for key, p in layer.named_parameters():
            if any(w in key for w in ("lora_B", "hada_w1_a", "lokr_w1", "lambda_b")):
                p.mul_(factor)
                return


def measure(name, config, dtype, near_zero, safe):
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("linear", torch.nn.Linear(768, 768).to(dtype))
    model = peft.get_peft_model(net, copy.deepcopy(config))
    layer = model.base_model.model.linear
    shrink(layer, name)
    if near_zero:
        wide = copy.deepcopy(model).double().base_model.model.linear
        before = wide.get_base_layer().weight.detach().clone()
        wide.merge()
        moved = wide.get_base_layer().weight.detach() - before
        with torch.no_grad():
            layer.get_base_layer().weight.copy_(-moved)
    wide = copy.deepcopy(model).double().base_model.model.linear
    wide.merge()
    layer.merge(safe_merge=safe)
    exact = wide.get_base_layer().weight.detach()
    return ulps(layer.get_base_layer().weight.detach(), exact)


def main():
    print(f"peft {peft.__version__}, torch {torch.__version__}; ulps: largest, share above one")
    print("| tuner | dtype | merge | safe merge | near zero |")
    print("|---|---|---|---|---|")
    for name, config in tuners():
        for dtype in DIGITS:
            cells = []
            for near_zero, safe in ((False, False), (False, True), (True, False)):
                try:
                    far = measure(name, config, dtype, near_zero, safe)
                    cells.append(f"{far.max():.3g}, {100 * (far > 1).double().mean():.3g} %")
                except Exception as error:  # a tuner may not know the dtype
                    cells.append(type(error).__name__)
            print(f"| {name} | {str(dtype)[6:]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
