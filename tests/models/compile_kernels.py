"""Compiles every kernel for A100 and H100; needs no GPU. ``python -m tests.models.compile_kernels``"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from occstream.evaluation import tritonpull
from occstream.evaluation.cudapull import VOXELS
from occstream.models import kernels


def build(kernel, arch: int, pointers: dict[str, str], numbers: str, constants: dict) -> None:
    kinds = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(numbers.split(), "i32")
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32))
    print(f"{kernel.__name__} sm_{arch}: {len(made.asm['cubin'])} bytes")


if __name__ == "__main__":
    k = kernels._kernels()
    for arch in (80, 90):
        block = {"ACC": k.fp32, "POINTS": 16, "CH": 64}
        kinds = {"weight": "fp32", "pixel": "i64", "context": "bf16", "starts": "i64", "voxels": "i64", "out": "fp32"}
        build(k.pool_forward, arch, kinds, "channels", block)
        kinds = {
            "grad": "fp32",
            "weight": "fp32",
            "context": "bf16",
            "voxel": "i64",
            "to_weight": "fp32",
            "to_context": "bf16",
        }
        build(k.pool_backward, arch, kinds, "channels bins cells", block)
        kinds = {
            "values": "bf16",
            "owner": "i64",
            "locations": "fp32",
            "weights": "fp32",
            "grad": "fp32",
            "out": "fp32",
        }
        kinds |= {"to_values": "fp32", "to_locations": "fp32", "to_weights": "fp32"}
        for dims in (2, 3):
            for back in (False, True):
                absent = ("out",) if back else ("grad", "to_values", "to_locations", "to_weights")
                constants = {"POINTS": 4, "DIMS": dims, "BACK": back, "ACC": k.fp32, "ROWS": 16, "CH": 32}
                build(k.sample, arch, kinds, "queries heads channels sx sy sz", constants | dict.fromkeys(absent))
        kinds = {"logits": "fp32", "columns": "fp32", "slope": "fp32", "partial": "fp32"}
        constants = {"WEIGHTED": True, "SQUARE": True, "ACC": k.fp32, "BLOCK": 1024, "gamma": 2.0}
        build(k.negative_focal, arch, kinds, "count classes", constants)
        bytes_of = "sources second sure place things trusted out confidence"
        whole = {"index": "i32", "numbers": "i32", "frames": "i32", "last": "i32", "weights": "i32", "table": "i32"}
        wide = {"maps": "fp64", "slots": "i64", "shares": "i64", "prior": "i64"}
        kinds = dict.fromkeys(bytes_of.split(), "u8") | whole | wide
        switches = {"DOUBTS": True, "PARKED": True, "TRUSTED": True, "DETAILS": True, "VOXELS": VOXELS, "CH": 32}
        numbers = "count sources_count itself classes words a b c_size"
        for bayes in (False, True):
            build(tritonpull.pull, arch, kinds, numbers, {"BAYES": bayes, **switches})
