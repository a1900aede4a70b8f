"""Writes tests/golden/data/safetensors: what the official Python packages write
and which files they accept.

    python tests/golden/make_safetensors.py

Needs torch, numpy, safetensors, huggingface_hub and peft. Made with torch
2.11.0, safetensors 0.8.0 and peft 0.21.2; nothing in it is random.
"""

import json
import math
import pathlib
import shutil
import struct
import tempfile

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).parent / "data" / "safetensors"


def pattern(dtype, shape):
    """0, 1, 2, ... in the given dtype; test_safetensors.cpp makes the same."""
    count = math.prod(shape)
    values = torch.arange(count, dtype=torch.float32)
    if dtype == torch.bool:
        values = values.remainder(2)
    return values.to(dtype).reshape(shape)


DTYPES = [
    ("bool", torch.bool),
    ("u8", torch.uint8),
    ("i8", torch.int8),
    ("i16", torch.int16),
    ("u16", torch.uint16),
    ("i32", torch.int32),
    ("u32", torch.uint32),
    ("i64", torch.int64),
    ("u64", torch.uint64),
    ("f16", torch.float16),
    ("bf16", torch.bfloat16),
    ("f32", torch.float32),
    ("f64", torch.float64),
    ("c64", torch.complex64),
    ("f8_e4m3", torch.float8_e4m3fn),
    ("f8_e5m2", torch.float8_e5m2),
    ("f8_e4m3fnuz", torch.float8_e4m3fnuz),
    ("f8_e5m2fnuz", torch.float8_e5m2fnuz),
]


def write_files():
    save_file(
        {name: pattern(dtype, (3,)) for name, dtype in DTYPES},
        OUT / "dtypes.safetensors",
        metadata={"format": "pt"},
    )
    save_file(
        {
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 4),
            "z": pattern(torch.float32, (2, 3)),
            "a.weight": pattern(torch.float32, (2, 2)),
            'quote " slash \\ tab \t bell \a del \x7f ü 字 😀': pattern(
                torch.int64, (2,)
            ),
            "byte": pattern(torch.uint8, (3,)),
        },
        OUT / "shapes.safetensors",
        metadata={"note": 'line\nbreak "ü"'},
    )
    save_file({"one": torch.ones(1)}, OUT / "no_metadata.safetensors")
    save_file({}, OUT / "nothing.safetensors")


def header(text, data=b"", length=None):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape="[1]", offsets="[0,4]", more=""):
    return '{%s"dtype":"%s","shape":%s,"data_offsets":%s}' % (
        more,
        dtype,
        shape,
        offsets,
    )


def cases():
    """Name and bytes of every file, and whether libpeft refuses it although the
    package accepts it."""
    four = b"\0" * 4
    one = entry()
    stricter = True
    yield "plain", header('{"a":%s}' % one, four)
    yield "space before", header(' \n\t\r{"a":%s}' % one, four)
    yield "space after", header('{"a":%s} \n\t\r' % one, four)
    yield "space within", header('{ "a" : %s }' % one, four)
    yield "no bytes", b""
    yield "seven bytes", b"\0" * 7
    yield "length only", struct.pack("<Q", 0)
    yield "length beyond the file", header('{"a":%s}' % one, four, length=500)
    yield "length one too long", header("{}", length=3)
    yield "length above the limit", header("{}", length=100_000_001)
    yield "length 2^63", header("{}", length=1 << 63)
    yield "length 2^64-1", header("{}", length=(1 << 64) - 1)
    yield "length shorter than the header", header('{"a":%s}' % one, four, length=20)
    yield "empty object", header("{}")
    yield "empty object and data", header("{}", four)
    yield "empty header", header("")
    yield "blank header", header("        ")
    yield "array", header("[]")
    yield "number", header("1")
    yield "null", header("null")
    yield "string", header('"a"')
    yield "cut object", header('{"a":')
    yield "trailing comma", header('{"a":%s,}' % one, four)
    yield "text after", header('{"a":%s}x' % one, four)
    yield "two objects", header("{}{}")
    yield "zero byte after", header('{"a":%s}\0' % one, four)
    yield "zero byte in a name", header('{"a\0":%s}' % one, four)
    yield "escaped zero in a name", header('{"a\\u0000":%s}' % one, four)
    yield "newline in a name", header('{"a\n":%s}' % one, four)
    yield "comment", header('{/**/"a":%s}' % one, four)
    yield "single quotes", header("{'a':%s}" % one, four)
    yield "byte order mark", header(b"\xef\xbb\xbf" + b'{"a":%s}' % one.encode(), four)
    yield "not UTF-8", header(b'{"\xff":%s}' % one.encode(), four)
    yield "overlong UTF-8", header(b'{"\xc0\x80":%s}' % one.encode(), four)
    yield "surrogate in UTF-8", header(b'{"\xed\xa0\x80":%s}' % one.encode(), four)
    yield "escaped lone surrogate", header('{"\\ud800":%s}' % one, four)
    yield "escaped pair", header('{"\\ud83d\\ude00":%s}' % one, four)
    yield "empty name", header('{"":%s}' % one, four)
    yield "entry null", header('{"a":null}')
    yield "entry number", header('{"a":1}')
    yield "entry string", header('{"a":"F32"}')
    yield "entry empty", header('{"a":{}}')
    yield "entry as a list", header('{"a":["F32",[1],[0,4]]}', four), stricter
    yield "no dtype", header('{"a":{"shape":[1],"data_offsets":[0,4]}}', four)
    yield "no shape", header('{"a":{"dtype":"F32","data_offsets":[0,4]}}', four)
    yield "no offsets", header('{"a":{"dtype":"F32","shape":[1]}}', four)
    yield "unknown field", header('{"a":%s}' % entry(more='"x":[1,{"y":-1.5e3}],'), four)
    yield "unknown field, huge integer", header(
        '{"a":%s}' % entry(more='"x":%s,' % ("9" * 30)), four
    )
    yield "unknown field, infinite", header('{"a":%s}' % entry(more='"x":1e999,'), four)
    yield "unknown field, NaN", header('{"a":%s}' % entry(more='"x":NaN,'), four)
    for depth in (125, 126, 1000):
        yield "nested %d deep" % (depth + 2), header(
            '{"a":%s}' % entry(more='"x":%s%s,' % ("[" * depth, "]" * depth)), four
        )
    yield "dtype unknown", header('{"a":%s}' % entry("F31"), four)
    yield "dtype lower case", header('{"a":%s}' % entry("f32"), four)
    yield "dtype empty", header('{"a":%s}' % entry(""), four)
    yield "dtype number", header(
        '{"a":{"dtype":0,"shape":[1],"data_offsets":[0,4]}}', four
    )
    yield "dtype as an object", header(
        '{"a":{"dtype":{"F32":null},"shape":[1],"data_offsets":[0,4]}}', four
    ), stricter
    for dtype, bits in (
        [(d, 8) for d in ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")]
        + [(d, 8) for d in ("F8_E4M3FNUZ", "F8_E5M2FNUZ")]
        + [(d, 16) for d in ("I16", "U16", "F16", "BF16")]
        + [(d, 32) for d in ("I32", "U32", "F32")]
        + [(d, 64) for d in ("I64", "U64", "F64", "C64")]
        + [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)]
    ):
        size = bits // 2
        yield "dtype " + dtype, header(
            '{"a":%s}' % entry(dtype, "[4]", "[0,%d]" % size), b"\0" * size
        )
    yield "dtype C128", header('{"a":%s}' % entry("C128", "[1]", "[0,16]"), b"\0" * 16)
    yield "half a byte", header('{"a":%s}' % entry("F4", "[1]", "[0,1]"), b"\0")
    yield "shape number", header('{"a":%s}' % entry(shape="1"), four)
    yield "shape null", header('{"a":%s}' % entry(shape="null"), four)
    yield "shape negative", header('{"a":%s}' % entry(shape="[-1]"), four)
    yield "shape minus zero", header('{"a":%s}' % entry(shape="[-0]", offsets="[0,0]"))
    yield "shape fraction", header('{"a":%s}' % entry(shape="[1.0]"), four)
    yield "shape string", header('{"a":%s}' % entry(shape='["1"]'), four)
    yield "shape true", header('{"a":%s}' % entry(shape="[true]"), four)
    yield "shape exponent", header('{"a":%s}' % entry(shape="[1e0]"), four)
    yield "shape beyond 64 bits", header('{"a":%s}' % entry(shape="[18446744073709551617]"), four)
    yield "shape too small", header('{"a":%s}' % entry(shape="[1]", offsets="[0,8]"), four * 2)
    yield "shape too large", header('{"a":%s}' % entry(shape="[2]"), four)
    yield "scalar", header('{"a":%s}' % entry(shape="[]"), four)
    yield "seventy dimensions", header('{"a":%s}' % entry(shape=json.dumps([1] * 70)), four)
    yield "zero size", header('{"a":%s}' % entry(shape="[3,0]", offsets="[0,0]"))
    yield "zero size with bytes", header('{"a":%s}' % entry(shape="[0]"), four)
    yield "elements overflow", header('{"a":%s}' % entry(shape="[4294967296,4294967296]"), four)
    yield "elements overflow to the right size", header(
        '{"a":%s}' % entry(shape="[4611686018427387905,4]"), four * 4
    )
    yield "bytes overflow", header('{"a":%s}' % entry(shape="[4611686018427387905]"), four)
    yield "overflow before a zero", header(
        '{"a":%s}' % entry(shape="[9223372036854775807,3,0]", offsets="[0,0]")
    )
    yield "large sizes after a zero", header(
        '{"a":%s}' % entry(shape="[0,4611686018427387904]", offsets="[0,0]")
    )
    yield "zero, and beyond a signed size", header(
        '{"a":%s}' % entry(shape="[0,9223372036854775808]", offsets="[0,0]")
    ), stricter
    yield "offsets reversed", header('{"a":%s}' % entry(offsets="[4,0]"), four)
    yield "offsets number", header('{"a":%s}' % entry(offsets="4"), four)
    yield "offsets of one", header('{"a":%s}' % entry(offsets="[0]"), four)
    yield "offsets of three", header('{"a":%s}' % entry(offsets="[0,4,4]"), four)
    yield "offsets negative", header('{"a":%s}' % entry(offsets="[-4,0]"), four)
    yield "offsets minus zero", header('{"a":%s}' % entry(offsets="[-0,4]"), four)
    yield "offsets fraction", header('{"a":%s}' % entry(offsets="[0,4.0]"), four)
    yield "offsets 2^64-1", header(
        '{"a":%s}' % entry(offsets="[18446744073709551612,18446744073709551615]"), four
    )
    yield "offsets beyond the file", header('{"a":%s}' % entry(shape="[2]", offsets="[0,8]"), four)
    yield "bytes left over", header('{"a":%s}' % one, four * 2)
    two = '{"a":%s,"b":%s}'
    yield "two tensors", header(two % (one, entry(offsets="[4,8]")), four * 2)
    yield "two, listed backwards", header(two % (entry(offsets="[4,8]"), one), four * 2)
    yield "hole at the start", header('{"a":%s}' % entry(offsets="[4,8]"), four * 2)
    yield "hole between", header(two % (one, entry(offsets="[8,12]")), four * 3)
    yield "overlap", header(
        two % (entry(shape="[2]", offsets="[0,8]"), entry(shape="[2]", offsets="[4,12]")),
        four * 3,
    )
    yield "same bytes twice", header(two % (one, one), four)
    yield "zero size between", header(
        '{"a":%s,"b":%s,"c":%s}'
        % (one, entry(shape="[0]", offsets="[4,4]"), entry(offsets="[4,8]")),
        four * 2,
    )
    yield "zero size inside another", header(
        two % (entry(shape="[2]", offsets="[0,8]"), entry(shape="[0]", offsets="[4,4]")),
        four * 2,
    )
    yield "misaligned", header(
        two % (entry("U8", offsets="[0,1]"), entry(offsets="[1,5]")), b"\1\0\0\200\77"
    )
    yield "odd header length", header('{"a":%s} ' % one, four)
    yield "metadata", header('{"__metadata__":{"k":"v"},"a":%s}' % one, four)
    yield "metadata last", header('{"a":%s,"__metadata__":{"k":"v"}}' % one, four)
    yield "metadata only", header('{"__metadata__":{"k":"v"}}')
    yield "metadata empty", header('{"__metadata__":{}}')
    yield "metadata null", header('{"__metadata__":null}')
    yield "metadata list", header('{"__metadata__":[]}')
    yield "metadata string", header('{"__metadata__":"k"}')
    yield "metadata number value", header('{"__metadata__":{"k":1}}')
    yield "metadata null value", header('{"__metadata__":{"k":null}}')
    yield "metadata nested", header('{"__metadata__":{"k":{}}}')
    yield "metadata escaped name", header('{"__metadata\\u005f_":{"k":"v"}}')
    yield "metadata like a tensor", header('{"__metadata__":%s}' % one, four)
    yield "duplicate tensor", header('{"a":%s,"a":%s}' % (one, one), four), stricter
    yield "duplicate tensor, escaped", header('{"a":%s,"\\u0061":%s}' % (one, one), four), stricter
    yield "duplicate dtype", header('{"a":%s}' % entry(more='"dtype":"F32",'), four)
    yield "duplicate unknown field", header('{"a":%s}' % entry(more='"x":1,"x":1,'), four), stricter
    yield "duplicate metadata", header('{"__metadata__":{},"__metadata__":{}}')
    yield "duplicate metadata key", header('{"__metadata__":{"k":"v","k":"v"}}'), stricter


def attempt(action):
    try:
        action()
    except Exception:
        return False
    return True


def write_cases():
    def open_only(path):
        with safe_open(path, framework="pt") as file:
            file.keys()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "case.safetensors"
        for name, data, *stricter in cases():
            path.write_bytes(data)
            opens = attempt(lambda: open_only(path))
            assert opens or not stricter, name
            rows.append(
                {
                    "name": name,
                    "hex": data.hex(),
                    "opens": opens,
                    "loads": opens and attempt(lambda: load_file(path)),
                    "libpeft_refuses": bool(stricter),
                }
            )
    text = ",\n".join(json.dumps(row) for row in rows)
    (OUT / "cases.json").write_text("[\n" + text + "\n]\n")


def write_configs():
    with tempfile.TemporaryDirectory() as folder:
        LoraConfig().save_pretrained(folder)
        shutil.copy(f"{folder}/adapter_config.json", OUT / "lora_defaults.json")

    # What a trained model's adapter looks like, with every kind of value.
    model = torch.nn.ModuleDict(
        {"query": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)}
    )
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules="que.*",
        rank_pattern={"query": 2},
        alpha_pattern={"query": 0.5},
        modules_to_save=["head"],
        init_lora_weights="gaussian",
        use_rslora=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(model, config).save_pretrained(folder)
        shutil.copy(f"{folder}/adapter_config.json", OUT / "lora_trained.json")

    odd = {
        "peft_type": "LORA",
        "numbers": [0, -1, 2**63, -(2**63), 2**64 - 1, 0.0, -0.0, 1.0, 16.0, 0.05, 1e-5]
        + [1e-4, 0.1 + 0.2, 1e15, 1e16, 1e22, 123456789012345680.0, 1.5e300, 5e-324],
        "text": "ü 字 😀 \u2028 \x7f \" \\ / \b \f \n \r \t \x01",
        "ключ": True,
        "Z": None,
        "a": {},
        "b": [],
        "nested": {"list": [[1, [2]], {"k": []}], "object": {"k": {"k": False}}},
        "😀": "after every letter",
        "\uffff": "before it",
    }
    (OUT / "python.json").write_text(json.dumps(odd, indent=2, sort_keys=True))


def write_sharded():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(pattern(tensor.dtype, tensor.shape) / 8 + 0.5)
    model.eval()
    folder = OUT / "sharded"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=160)
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 4
    save_file({"x": x, "y": model(x).detach()}, OUT / "sharded_expected.safetensors")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    write_files()
    write_cases()
    write_configs()
    write_sharded()
    for path in OUT.rglob("*.safetensors"):
        path.chmod(0o644)
