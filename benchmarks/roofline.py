"""How near the pass over a frozen backbone comes to what the processor can do.

    python benchmarks/roofline.py

The peak is a large product of matrices, in fp32 and in bf16. The pass is the kit's: batches of 32, channels_last, every
core; "before" gives freed memory back to the system at each layer, as the C library does by itself. Both compute the
same bits. Operations are counted by torch.utils.flop_counter, a multiplication and an addition being two. Decoding
alone is that of the photographs of photo_files.py, a thread a core.
"""

import dataclasses
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import interleaved, median, report, run_itself, verdict, workplace

IMAGE_NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "vit_b_16")
TEXT, TOKENS, BATCH = "MiniLM's shape", 128, 32
TARGETS = {"resnet18": 0.9, TEXT: 0.9}
EDGE = 4096


@dataclass
class Options:
    samples: int = 128
    """Through each network."""
    repeats: int = 2
    """Rounds, before and now in turn; medians count."""
    only: str = ""
    """Used by the benchmark itself: a network, or a precision."""
    before: bool = False
    """Used by the benchmark itself."""
    output: str = ""
    """JSON file; default: benchmarks/results/roofline.json."""


def peak(precision: str) -> float:
    """Operations a second of the best of ten products, in units of 1e9."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    one, other = (torch.randn(EDGE, EDGE).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - started)
    return 2 * EDGE**3 / best / 1e9


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network without its head's meaning, and a batch for it."""
    torch.manual_seed(0)
    if name == TEXT:
        import transformers

        from finetune.models.bundled import bundled_folder

        words = len(transformers.AutoTokenizer.from_pretrained(bundled_folder("bundled/bert")))
        config = transformers.BertConfig(
            vocab_size=words, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        return transformers.BertModel(config, add_pooling_layer=False).eval(), torch.randint(5, words, (BATCH, TOKENS))
    import torchvision

    from finetune.base.device import module_to_device, to_device

    cpu = torch.device("cpu")
    model = torchvision.models.get_model(name).eval()
    return module_to_device(model, cpu), to_device(torch.randn(BATCH, 3, 224, 224), cpu)


def passed(name: str, samples: int, before: bool) -> dict[str, Any]:
    """Samples a second, operations a sample, and the hash of what comes out."""
    from torch.utils.flop_counter import FlopCounterMode

    from finetune.base.allocator import freed_memory_kept

    model, batch = build(name)
    with torch.inference_mode(), nullcontext() if before else freed_memory_kept():
        with FlopCounterMode(display=False) as counter:
            model(batch)
        started = time.perf_counter()
        for _ in range(samples // BATCH):
            outputs = model(batch)
        seconds = time.perf_counter() - started
    outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.last_hidden_state
    digest = hashlib.sha256(outputs.numpy().tobytes()).hexdigest()
    rate = samples // BATCH * BATCH / seconds
    return {"rate": rate, "operations": counter.get_total_flops() / BATCH, "sha256": digest}


def decoded(size: tuple[int, int], count: int) -> dict[str, float]:
    """Images a second by decoding alone."""
    from photo_files import write_photos

    from finetune.data.decode import read_image
    from finetune.models.bundled import PHOTOS

    with workplace() as folder:
        files = sorted(write_photos(folder, *size, count).glob("*/*.jpg"))
        torch.set_num_threads(1)
        preprocessing = dataclasses.replace(PHOTOS, decode="scaled")

        def prepare(file: Path) -> torch.Tensor:
            return preprocessing.resize(read_image(file, preprocessing.decoding))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            started = time.perf_counter()
            list(pool.map(prepare, files))
            return {"rate": count / (time.perf_counter() - started)}


DECODED = {"12 MP": ((4000, 3000), 40), "500 px": ((500, 375), 400)}


def main(options: Options) -> None:
    if options.only in ("fp32", "bf16"):
        print(json.dumps(peak(options.only)))
    elif options.only in DECODED:
        print(json.dumps(decoded(*DECODED[options.only])))
    elif options.only:
        print(json.dumps(passed(options.only, options.samples, options.before)))
    else:
        compare(options)


def compare(options: Options) -> None:
    peaks = {precision: run_itself(__file__, "--only", precision) for precision in ("fp32", "bf16")}
    rows: list[dict[str, Any]] = [
        {"": f"peak, {name}", "a second": "", "GFLOP/s": round(value), "share of peak": "", "of before": "", "bits": ""}
        for name, value in peaks.items()
    ]
    targets = {}
    for name in (*IMAGE_NETWORKS, TEXT):
        words = ["--only", name, "--samples", str(options.samples)]
        found = interleaved(options.repeats, {
            "now": lambda words=words: run_itself(__file__, *words),
            "before": lambda words=words: run_itself(__file__, *words, "--before"),
        })  # fmt: skip
        now, before = (median([one["rate"] for one in found[way]]) for way in ("now", "before"))
        achieved = now * found["now"][0]["operations"] / 1e9
        same = len({one["sha256"] for ones in found.values() for one in ones}) == 1
        rows.append({
            "": name, "a second": round(now, 1), "GFLOP/s": round(achieved),
            "share of peak": achieved / peaks["fp32"], "of before": before / now, "bits": "equal" if same else "OTHERS",
        })  # fmt: skip
        if name in TARGETS:
            targets[f"{name}, time of before"] = verdict(before / now, TARGETS[name])
    for name in DECODED:
        rate = run_itself(__file__, "--only", name)["rate"]
        rows.append({
            "": f"decoding alone, {name}", "a second": round(rate, 1), "GFLOP/s": "", "share of peak": "",
            "of before": "", "bits": "",
        })  # fmt: skip
    title = "The pass over a frozen backbone, batches of 32, images of 224, texts of 128 tokens"
    report("roofline", title, rows, options.output, options=dataclasses.asdict(options), targets=targets)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
