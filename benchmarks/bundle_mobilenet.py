"""Make `bundled/mobilenet` of torchvision's own weights: the same file, bit for bit, on every machine.

    python benchmarks/bundle_mobilenet.py mobilenet_v2-b0353104.pth src/finetune/bundled/mobilenet.safetensors
    python benchmarks/bundle_mobilenet.py mobilenet_v2-b0353104.pth mobilenet.safetensors --cost crops

Leaves the classifier out and keeps the weights of convolutions in float16, which halves the file; batch normalisation
stays in float32, for its variances span more than float16 does. Prints the sha256; with --cost also what float16 costs
on a folder of images with a sub-folder a class (such as crops.py writes): the cosine of features before and after, and
the validation accuracy of a linear head on either, the mean over five splits.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import save_file

from finetune.base.files import sha256_of_file
from finetune.data.folder import open_folder

# Of the file that torchvision calls MobileNet_V2_Weights.IMAGENET1K_V1.
ORIGINAL_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
LAST_LAYER = "classifier."
SEEDS = 5


def bundle(original: Path, output: Path) -> str:
    """Write `output`; returns its sha256."""
    found = sha256_of_file(original)
    if found != ORIGINAL_SHA256:
        raise SystemExit(f"{original}: sha256 {found}, expected {ORIGINAL_SHA256}; fetch torchvision's own file")
    state = torch.load(original, weights_only=True)
    kept = {name: value for name, value in state.items() if not name.startswith(LAST_LAYER)}
    # Convolutions are the only tensors of four dimensions.
    tensors = {name: value.half() if value.dim() == 4 else value for name, value in kept.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, output)
    return sha256_of_file(output)


def cost(original: Path, bundled: Path, images: Path) -> None:
    """Print what float16 changes, of features and of decisions."""
    from pretraining import features_of, head_accuracy  # beside this file; needed for this alone

    source = open_folder(images)
    before, after = (features_of(source, "bundled/mobilenet", str(file)) for file in (original, bundled))
    cosine = torch.nn.functional.cosine_similarity(before, after)
    print(f"cosine of features: {cosine.mean():.6f} in the mean, {cosine.min():.6f} at least")
    for name, features in {"float32": before, "float16": after}.items():
        accuracy = mean(head_accuracy(features, source, 0, seed) for seed in range(SEEDS))
        print(f"accuracy of a head on {name}: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cost", type=Path, metavar="IMAGES")
    options = parser.parse_args()
    print(bundle(options.original, options.output))
    if options.cost:
        cost(options.original, options.output, options.cost)
