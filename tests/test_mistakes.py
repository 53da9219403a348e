"""Mistakes that people make, each answered with an exit code and one line: what, the value, what is allowed, what to do.

No traceback, nothing half-made left behind.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read, small_recipe, train_run
from PIL import Image
from terminal import run_in_terminal
from torchvision.models import get_model

from finetune import Images
from finetune.base.files import write_atomically
from finetune.cli import main
from finetune.store.run_folder import RunFolder

IMAGES = ["vgg_head", "--images"]
QUICK = ["--epochs", "1", "--train-samples", "100", "--device", "cpu", "--quiet"]


# ---- What the mistakes are made with --------------------------------------------------------------------------------


def pictures(folder: str, **classes: int) -> str:
    """A folder of so many pictures a class, each another grey."""
    for label, count in classes.items():
        Path(folder, label).mkdir(parents=True)
        for number in range(count):
            grey = (17 * number + 5 * len(label)) % 256
            Image.new("RGB", (12, 12), (grey, grey, 255 - grey)).save(Path(folder, label, f"{number}.png"))
    return folder


def table(name: str, text: str | bytes) -> str:
    """A table beside two pictures, a.png and b.png."""
    for picture in ("a", "b"):
        Image.new("RGB", (12, 12)).save(f"{picture}.png")
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def recipe_file(text: str) -> str:
    Path("mine.py").write_text("from finetune import *\n" + text)
    return "mine.py"


def weights(name: str, content) -> str:
    torch.save(content, name)
    return name


# Of the usual run here, and of what is exported of it: a folder each, that is copied.
MADE: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("made")
    train_run(folder / "run", small_recipe(epochs=1, augment="none"), save_every_steps=0)
    assert main(["export", str(folder / "run"), "--output", str(folder / "export" / "model.pt")]) == 0
    MADE.update(run=folder / "run", export=folder / "export")


def finished_run(recipe=None) -> RunFolder:
    if recipe is not None:
        return train_run(Path("run"), recipe, save_every_steps=0)
    return RunFolder(Path(shutil.copytree(MADE["run"], "run")))


def of_newer_schema() -> list[str]:
    run = finished_run()
    state = read(run) | {"schema_version": 999}
    for path in run.checkpoints.glob("*.pt"):
        write_atomically(path, lambda stream: torch.save(state, stream), trailer=True)
    return ["resume", "run"]


def edited(change: Callable[[dict], object]) -> list[str]:
    run = finished_run()
    record = json.loads(run.recipe_file.read_text())
    change(record)
    run.recipe_file.write_text(json.dumps(record))
    return ["resume", "run"]


def exported(change: Callable[[Path], object]) -> list[str]:
    finished_run()
    shutil.copytree(MADE["export"], "run", dirs_exist_ok=True)
    change(Path("run/model.pt"))
    return ["predict", "run/model.pt", pictures("photos", cat=1) + "/cat/0.png"]


def without_checkpoints() -> list[str]:
    for path in finished_run().checkpoints.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    return ["resume", "run"]


def broken_picture() -> list[str]:
    folder = pictures("photos", cat=8, dog=8)
    Path(folder, "cat", "3.png").write_bytes(b"<html>not found</html>")
    return [*IMAGES, folder, *QUICK]


def enormous_file() -> list[str]:
    folder = pictures("photos", cat=4, dog=4)
    with open(Path(folder, "cat", "9.png"), "wb") as stream:
        stream.truncate(2_000_000_000)  # all holes
    return [*IMAGES, folder, *QUICK]


def moved_photos() -> list[str]:
    train_run(Path("run"), small_recipe(data=Images(pictures("photos", cat=8, dog=8)), batch_size=4, epochs=1))
    Path("photos").rename("elsewhere")
    return ["resume", "run", "--epochs", "2", "--lr", "1e-3"]


def more_photos() -> list[str]:
    train_run(Path("run"), small_recipe(data=Images(pictures("photos", cat=8, dog=8)), batch_size=4, epochs=1))
    shutil.copyfile("photos/cat/0.png", "photos/cat/another.png")
    return ["resume", "run", "--epochs", "2", "--lr", "1e-3"]


def of_another_recipe() -> list[str]:
    assert main(["vgg_head", *QUICK, "--run", "run"]) == 0
    return ["resnet_head", *QUICK, "--run", "run", "--resume"]


def a_run_already() -> list[str]:
    assert main(["vgg_head", *QUICK, "--run", "run"]) == 0
    return ["vgg_head", *QUICK, "--run", "run"]


def link_out_of_the_folder() -> list[str]:
    folder = pictures("photos", cat=4, dog=4)
    Image.new("RGB", (12, 12)).save("private.png")
    Path(folder, "cat", "9.png").symlink_to(Path("private.png").resolve())
    return [*IMAGES, folder]


def odd_names() -> list[str]:
    folder = pictures("photos", cat=4, dog=4)
    Path(folder, "cat", "a\nb\x1b[31m.png").write_bytes(b"no picture")
    return [*IMAGES, folder, *QUICK]


def folder_that_nobody_may_read() -> list[str]:
    Path("plain-file").write_text("")
    return [*IMAGES, "plain-file/photos"]


VGG = "bundled/vgg"
MISTAKES: dict[str, tuple[Callable[[], list[str]], int, list[str]]] = {
    # ---- The command line
    "a recipe that is not there": (lambda: ["vgg_haed"], 2, ["vgg_haed", "no such file, command or recipe", "did you mean vgg_head?"]),
    "a command that is not there": (lambda: ["resum"], 2, ["did you mean resume?"]),
    "an option that is not there": (lambda: ["vgg_head", "--epohcs", "3"], 2, ["--epohcs", "--epochs", "vgg_head --help"]),
    "an option of another command": (lambda: ["resume", "--augment", "light"], 2, ["--augment", "resume --help"]),
    "an option without a value": (lambda: ["vgg_head", "--optimizer"], 2, ["--optimizer: needs a value"]),
    "a word for a number": (lambda: ["vgg_head", "--epochs", "many"], 2, ["--epochs many: is no whole number"]),
    "a fraction for a count": (lambda: ["vgg_head", "--epochs", "1.5"], 2, ["--epochs 1.5: is no whole number"]),
    "a word for a rate": (lambda: ["vgg_head", "--lr", "fast"], 2, ["--lr fast: is no number"]),
    "a word for a number that may be left out": (lambda: ["vgg_head", "--workers", "some"], 2, ["--workers some: is no whole number"]),
    "a word that nobody needs": (lambda: ["train", "vgg_head"], 2, ["train: is no command; to train, name the recipe: finetune vgg_head"]),
    "an option first": (lambda: ["--images", "photos"], 2, ["--images: a recipe or a command comes first, as in: finetune photo_head --images"]),
    "texts for a recipe of images": (lambda: ["vgg_head", "--texts", "my mail.csv"], 2, ["--texts: vgg_head reads images; for texts: finetune bert_head --texts 'my mail.csv'"]),
    "images for a recipe of texts": (lambda: ["bert_head", "--images=photos"], 2, ["--images: bert_head reads texts; for images: finetune photo_head --images photos"]),
    "a choice that is none": (lambda: ["vgg_head", "--head", "deep"], 2, ["--head", "'deep'", "linear", "mlp", "append"]),
    "a word too many": (lambda: ["vgg_head", "my_photos"], 2, ["my_photos", "vgg_head --help"]),
    "no epochs": (lambda: ["vgg_head", "--epochs", "-1"], 2, ["--epochs -1: not allowed; give 1 or more"]),
    "negative epochs": (lambda: ["vgg_head", "--epochs", "-3"], 2, ["--epochs -3: not allowed; give 1 or more"]),
    "no batch": (lambda: ["vgg_head", "--batch-size", "0"], 2, ["--batch-size 0: not allowed; give 1 or more"]),
    "a negative rate": (lambda: ["vgg_head", "--lr", "-1"], 2, ["--lr -1.0: not allowed; give more than 0"]),
    "a rate that is no number": (lambda: ["vgg_head", "--lr", "nan"], 2, ["--lr nan: not allowed; give more than 0"]),
    "a rate without end": (lambda: ["vgg_head", "--lr", "inf"], 2, ["--lr inf: not allowed"]),
    "all of a head dropped": (lambda: ["vgg_head", "--dropout", "1"], 2, ["--dropout 1.0: not allowed; give 0 up to, not including, 1"]),
    "more parts than samples": (lambda: ["vgg_head", "--accumulate", "65"], 2, ["--accumulate 65: not allowed; give 1 up to the batch size"]),
    "negative clipping": (lambda: ["vgg_head", "--clip-norm", "-1"], 2, ["--clip-norm -1.0: not allowed"]),
    "negative patience": (lambda: ["vgg_head", "--patience", "-1"], 2, ["--patience -1: not allowed; give 0 (never) or more"]),
    "negative mixup": (lambda: ["vgg_head", "--mixup", "-1"], 2, ["--mixup -1.0: not allowed; give 0 (off) or more"]),
    "an unknown optimizer": (lambda: ["vgg_head", "--optimizer", "adamx"], 2, ["--optimizer adamx: unknown"]),
    "an unknown schedule": (lambda: ["vgg_head", "--schedule", "linear"], 2, ["--schedule", "'linear'", "cosine"]),
    "all of the data to validate": (lambda: ["vgg_head", "--validation-fraction", "1"], 2, ["--validation-fraction 1.0: not allowed"]),
    "too few samples": (lambda: ["vgg_head", "--train-samples", "5"], 2, ["or raise --train-samples"]),
    "an enormous image": (lambda: ["vgg_head", "--image-size", "100000000"], 2, ["give 0 (the backbone's) or 8 to 4096"]),
    "a GPU that is not there": (lambda: ["vgg_head", "--device", "cuda:7"], 2, ["--device cuda:7: cannot be used", "give auto, cpu"]),
    "a device that is none": (lambda: ["vgg_head", "--device", "toaster"], 2, ["--device toaster: cannot be used"]),
    "half precision on the CPU": (lambda: ["vgg_head", "--precision", "fp16", "--device", "cpu"], 2, ["--precision fp16: not on cpu; allowed there are fp32 and bf16"]),
    "a password in an option that is none": (lambda: ["vgg_head", "--notfy", "json://me:secret@host/x"], 2, ["Unrecognized options: --notfy, json://...;"]),
    "negative workers": (lambda: ["vgg_head", "--workers", "-1"], 2, ["--workers -1: not allowed; give 0 (none) or more"]),
    "no checkpoints kept": (lambda: ["vgg_head", "--keep", "0"], 2, ["--keep 0: not allowed; give 1 or more"]),
    "a negative pause between saves": (lambda: ["vgg_head", "--save-every-steps", "-1"], 2, ["--save-every-steps -1: not allowed"]),
    "no logging": (lambda: ["vgg_head", "--log-every-steps", "0"], 2, ["--log-every-steps 0: not allowed; give 1 or more"]),
    "a size that is none": (lambda: ["vgg_head", "--cache-limit", "much"], 2, ["--cache-limit much", "20GB"]),
    "views without augmentation": (lambda: ["vgg_head", "--views", "4"], 2, ["--views 4", "--augment"]),
    "a backbone that is not there": (lambda: ["vgg_head", "--backbone", "bundled/vggg"], 2, ["--backbone bundled/vggg: unknown", "did you mean bundled/vgg"]),
    "a backbone that reads texts": (lambda: ["vgg_head", "--backbone", "bundled/bert"], 2, ["bundled/bert: reads texts, not images", "finetune bert_head"]),
    "a backbone on a drive that is not there": (lambda: ["vgg_head", "--backbone", "~nosuch"], 2, ["unknown; allowed are"]),
    # ---- Weights
    "weights that are not there": (lambda: ["vgg_head", "--weights", "no.pt"], 2, ["--weights no.pt: no such file; allowed are default, none (random), or a .safetensors, .pt or .pth file"]),
    "weights of another architecture": (lambda: ["vgg_head", "--weights", weights("w.pt", get_model("squeezenet1_1").state_dict())], 2, ["w.pt: holds 6% of this network's names, so it is of another", "--weights FILE:KEY names a part"]),
    "weights that are a text": (lambda: ["vgg_head", "--weights", table("w.pt", "weights")], 2, ["w.pt", "restore it"]),
    "weights that hold numbers only": (lambda: ["vgg_head", "--weights", weights("w.pt", {"losses": [1, 2]})], 2, ["w.pt does not hold a state dict"]),
    "weights that hold no number": (lambda: ["vgg_head", "--weights", weights("w.pt", {name: value * float("nan") for name, value in get_model("squeezenet1_1").state_dict().items()}), "--backbone", "squeezenet1_1"], 2, ["holds values that are no numbers"]),
    "a checkpoint for weights": (lambda: [finished_run(), ["vgg_head", "--weights", "run/checkpoints/latest.pt"]][1], 2, ["is a checkpoint of a run; give what `finetune export RUN` writes"]),
    # ---- Data
    "a folder that is not there": (lambda: [*IMAGES, "no/where"], 2, ["--images no/where: no such folder; give 'digits'"]),
    "a file for a folder": (lambda: [*IMAGES, pictures("photos", cat=1) + "/cat/0.png"], 2, ["0.png: is a single image; to train, give the folder with one sub-folder a class; to classify it: finetune predict RUN"]),
    "a file that is no table": (lambda: [*IMAGES, table("list.ods", "x")], 2, ["list.ods: is a file, and no table (.csv"]),
    "a text file for texts": (lambda: ["bert_head", "--texts", table("mail.doc", "x")], 2, ["mail.doc: is a file, and no table (.csv"]),
    "a path below a file": (folder_that_nobody_may_read, 2, ["plain-file/photos: no such folder"]),
    "an empty folder": (lambda: [Path("photos").mkdir(), [*IMAGES, "photos"]][1], 2, ["0 class(es) found", "at least 2 are needed"]),
    "an empty class": (lambda: [pictures("photos", cat=4, dog=4), Path("photos/fish").mkdir(), [*IMAGES, "photos"]][2], 2, ["class folder 'fish' holds no images", "fill or remove it"]),
    "one class": (lambda: [*IMAGES, pictures("photos", cat=4)], 2, ["1 class(es) found (cat), at least 2 are needed"]),
    "pictures without class folders": (lambda: [*IMAGES, pictures("photos", cat=4) + "/cat"], 2, ["0 class(es) found"]),
    "one image a class": (lambda: [*IMAGES, pictures("photos", cat=1, dog=1)], 2, ["no class has two images, so nothing is left to validate with; add images"]),
    "train/ and something else": (lambda: [pictures("photos/train", cat=4, dog=4), pictures("photos/rest", cat=1), [*IMAGES, "photos"]][2], 2, ["rest/ stands beside train/ and holds images", "move it away, or into train/ if it is a class"]),
    "a broken image": (broken_picture, 1, ["cat/3.png is a web page, not the file itself", "--skip-broken"]),
    "an image of gigabytes": (enormous_file, 1, ["cat/9.png has 2,000,000,000 bytes, more than 1,073,741,824; repair or remove"]),
    "a link to somewhere else": (link_out_of_the_folder, 2, ["1 image(s) lie outside photos, like cat/9.png", "--allow-outside"]),
    "a name of a newline and a colour": (odd_names, 1, ["a\\nb\\x1b[31m.png", "cannot be decoded"]),
    "a batch larger than the data, and a wrong rate": (lambda: [*IMAGES, pictures("photos", cat=4, dog=4), "--batch-size", "10000", "--lr", "0"], 2, ["--lr 0.0: not allowed"]),
    "columns of a folder": (lambda: [*IMAGES, pictures("photos", cat=4, dog=4), "--label-column", "kind"], 2, ["columns and --separator belong to a .csv"]),
    "several labels of the digits": (lambda: ["vgg_head", "--separator", ","], 2, ["--images digits: columns and --separator belong to a .csv, .tsv, .jsonl, .json, .parquet, .xlsx file"]),
    "a table that is not there": (lambda: [*IMAGES, "no.csv"], 2, ["no.csv: no such file; give a .csv, .tsv, .jsonl, .json, .parquet, .xlsx file"]),
    "an empty table": (lambda: [*IMAGES, table("t.csv", "")], 2, ["t.csv: holds no rows; give a line a sample"]),
    "a table without a header": (lambda: [*IMAGES, table("t.csv", "a.png,cat\nb.png,dog\n")], 2, ["t.csv", "the first line of a csv must name the columns"]),
    "a column that is not there": (lambda: [*IMAGES, table("t.csv", "image,label\na.png,cat\nb.png,dog\n"), "--label-column", "kind"], 2, ["--label-column kind: no such column; its columns are 'image', 'label'"]),
    "a row too short": (lambda: [*IMAGES, table("t.csv", "image,label\na.png\n")], 2, ["t.csv line 2: has 1 values, the header 2 columns"]),
    "a quote that never ends": (lambda: [*IMAGES, table("t.csv", 'image,label\na.png,"cat\n')], 2, ["t.csv line 2", "check the quotes from there on"]),
    "a table that is no text": (lambda: [*IMAGES, table("t.csv", b"image,label\n\xff\xfe.png,cat\n")], 2, ["t.csv line 2: is not UTF-8", "save the file as UTF-8"]),
    "a line without a label": (lambda: [*IMAGES, table("t.csv", "image,label\na.png,\n")], 2, ["t.csv line 2: column 'label' is empty"]),
    "an image named twice": (lambda: [*IMAGES, table("t.csv", "image,label\na.png,cat\na.png,dog\n")], 2, ["t.csv line 3: names 'a.png' like line 2"]),
    "two columns of one name": (lambda: [*IMAGES, table("t.csv", "image,label,label\na.png,cat,dog\n")], 2, ["has several columns called 'label'"]),
    "a part that is none": (lambda: [*IMAGES, table("t.csv", "image,label,part\na.png,cat,exam\n"), "--split-column", "part"], 2, ["part 'exam' is not allowed; give train, val or test"]),
    "a line that is no JSON": (lambda: [*IMAGES, table("t.jsonl", '{"image": "a.png", "label": "cat"}\nhello\n')], 2, ["t.jsonl line 2: is not JSON"]),
    "a path out of the table's folder": (lambda: [*IMAGES, table("t.csv", "image,label\n../../a.png,cat\nb.png,dog\n")], 2, ["1 image(s) lie outside", "../../a.png", "--allow-outside"]),
    "a name that is too long": (lambda: ["vgg_head", "--images", "x" * 300], 1, ["File name too long"]),
    # ---- Recipes
    "a recipe with an error in it": (lambda: [recipe_file("def recipe(:\n")], 2, ["mine.py, line 2: SyntaxError"]),
    "a file without a recipe": (lambda: [recipe_file("x = 1\n")], 2, ["defines no function 'recipe(...) -> Recipe'"]),
    "a recipe that gives something else": (lambda: [recipe_file("def recipe(epochs: int = 3):\n    return 3\n")], 2, ["returned int, not a Recipe"]),
    "a recipe that fails": (lambda: [recipe_file("def recipe(epochs: int = 3):\n    return 1 / 0\n")], 2, ["mine.py, line 3: ZeroDivisionError"]),
    "a recipe that lacks a library": (lambda: [recipe_file("import no_such_module\n")], 2, ["mine.py, line 2: ModuleNotFoundError"]),
    "a recipe that leaves": (lambda: [recipe_file("raise SystemExit('needs more')\n")], 2, ["mine.py, line 2: SystemExit: needs more"]),
    "a recipe that leaves when it is called": (lambda: [recipe_file("def recipe(epochs: int = 3):\n    raise SystemExit(3)\n")], 2, ["mine.py, line 3: SystemExit: 3"]),
    "a parameter that every run has": (lambda: [recipe_file("def recipe(run: str = 'x'):\n    return 3\n")], 2, ["recipe parameter 'run': every run has an option of that name; give it another"]),
    "a parameter without a type": (lambda: [recipe_file("def recipe(epochs):\n    return 3\n")], 2, ["recipe parameter 'epochs': needs a type and a default"]),
    "a recipe that is a folder": (lambda: [Path("mine.py").mkdir(), ["mine.py"]][1], 2, ["mine.py"]),
    "a copy without a name": (lambda: ["new", "vgg_head"], 2, ["needs the name of a shipped recipe and a file"]),
    "a copy that is no Python": (lambda: ["new", "vgg_head", "my.txt"], 2, ["must end in .py"]),
    "a copy over another file": (lambda: ["new", "vgg_head", recipe_file("")], 2, ["mine.py exists already; give another name"]),
    # ---- Runs
    "nothing to resume": (lambda: ["resume"], 2, ["no unfinished run in", "finetune resume RUN"]),
    "a run that is not there": (lambda: ["resume", "no/run"], 1, ["run folder no/run does not exist; check the path"]),
    "a folder that is no run": (lambda: ["resume", pictures("photos", cat=1)], 1, ["photos/recipe.json does not exist"]),
    "a run in somebody else's folder": (lambda: ["vgg_head", *QUICK, "--run", pictures("photos", cat=1)], 2, ["--run photos: holds other files (cat); give a new folder"]),
    "a run over a file": (lambda: ["vgg_head", *QUICK, "--run", recipe_file("")], 2, ["--run mine.py: cannot be made"]),
    "a run over a run": (a_run_already, 2, ["--run run: already holds a run; add --resume"]),
    "the run of another recipe": (of_another_recipe, 2, ["--run run --resume: holds another run: ", "'bundled/vgg' in the run, 'bundled/resnet' now"]),
    "fewer epochs than there are": (lambda: [finished_run(small_recipe(augment="none")), ["resume", "run", "--epochs", "1"]][1], 2, ["--epochs 1: the run has 2 already; give more"]),
    "a rate without epochs": (lambda: [finished_run(), ["resume", "run", "--lr", "0.1"]][1], 2, ["--lr 0.1: at a resume only together with --epochs"]),
    "back to a file that is not there": (lambda: [finished_run(), ["resume", "run", "--from", "step-9.pt"]][1], 1, ["checkpoint step-9.pt does not exist"]),
    "back to a file that is no checkpoint": (lambda: [finished_run(), ["resume", "run", "--from", recipe_file("")]][1], 1, ["mine.py is truncated"]),
    "no good checkpoint": (without_checkpoints, 1, ["no good checkpoint in run/checkpoints", "step-000007.pt has no checksum"]),
    "a checkpoint of a newer version": (of_newer_schema, 1, ["has schema 999", "a newer version wrote it; upgrade"]),
    "a recipe of a run that was changed": (lambda: edited(lambda record: record["config"].update(seed=7)), 1, ["recipe.json is damaged: its content does not match its checksum"]),
    "a recipe of a run that was changed on purpose": (lambda: edited(lambda record: (record["config"].update(seed=7), record.update(checksum=""))), 1, ["seed: 7 in the run, 3 now"]),
    "a recipe of a run that lacks a part": (lambda: edited(lambda record: (record.pop("config"), record.update(checksum=""))), 1, ["recipe.json: 'config' is missing or of a wrong kind"]),
    "settings of a run that are none": (lambda: edited(lambda record: (record["settings"].update(saving=3), record.update(checksum=""))), 1, ["recipe.json: its settings are none"]),
    "a rate that climbs": (lambda: [finished_run(), ["resume", "run", "--epochs", "2", "--lr", "-1"]][1], 2, ["--lr -1.0: not allowed; give more than 0"]),
    "photos that moved": (moved_photos, 2, ["photos: is not there any more; if it was moved: finetune resume run --images PLACE"]),
    "photos that were added": (more_photos, 1, ["the data is not what run run was trained on: 1 image more, like cat/another.png; bring back", "--init-from run"]),
    "weights of a run that is not there": (lambda: ["vgg_head", "--init-from", "no/run"], 1, ["run folder no/run does not exist"]),
    "neither best nor latest": (lambda: ["vgg_head", "--init-from", "run:worst"], 2, ["--init-from run:worst: 'worst' is not allowed; give RUN, RUN:best or RUN:latest"]),
    "a bucket with one slash": (lambda: ["vgg_head", *QUICK, "--run", "s3:/bucket/run"], 2, ["--run s3:/bucket/run: neither a folder nor a URL; give s3://bucket/run, or a folder"]),
    "a bucket of a kind that is not known": (lambda: ["vgg_head", *QUICK, "--run", "ftpx://bucket/run"], 2, ["--run ftpx://bucket/run: cannot be used"]),
    # ---- Exports
    "an export of no run": (lambda: ["export", "no/run"], 1, ["run folder no/run does not exist"]),
    "an export of no known format": (lambda: [finished_run(), ["export", "run", "--output", "model.bin"]][1], 2, ["--output model.bin: must end in .pt"]),
    "an export over a folder": (lambda: [finished_run(), Path("model.pt").mkdir(), ["export", "run", "--output", "model.pt"]][2], 2, ["--output model.pt: is a folder; name a file"]),
    "a prediction without an export": (lambda: ["predict", "no.pt", "x.png"], 1, ["export no.pt does not exist; make it with: finetune export RUN"]),
    "a prediction of nothing": (lambda: exported(lambda path: None)[:2], 2, ["nothing to predict"]),
    "a prediction of what is not there": (lambda: [*exported(lambda path: None)[:2], "no.png"], 2, ["no.png: no such file or folder"]),
    "an export that lost its json": (lambda: exported(lambda path: path.with_suffix(".json").unlink()), 1, ["model.json does not exist"]),
    "an export cut short": (lambda: exported(lambda path: path.write_bytes(path.read_bytes()[:-9])), 1, ["model.pt does not match its .json"]),
    "a json that was changed": (lambda: exported(lambda path: path.with_suffix(".json").write_text(path.with_suffix(".json").read_text().replace('"0"', '"zero"'))), 1, ["model.json is damaged: its content does not match its checksum"]),
    "no class asked for": (lambda: [*exported(lambda path: None), "--top-k", "0"], 2, ["--top-k 0", "must be 1 or more"]),
    "an evaluation of other classes": (lambda: [finished_run(), ["evaluate", "run", "--images", pictures("photos", cat=2, dog=2)]][1], 2, ["class 'cat', 'dog' is not among those trained on"]),
    "a summary of nothing": (lambda: ["summary"], 2, ["needs a recipe"]),
    "a cache that is none": (lambda: ["cache", "wash"], 2, ["'wash'", "list", "clear"]),
    "features that are not there": (lambda: ["cache", "clear", "zzzz"], 2, ["zzzz"]),
}  # fmt: skip


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_an_exit_code_and_leaves_nothing_behind(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, code, said = MISTAKES[mistake]
    words = make()
    before = everything_below(tmp_path)
    capsys.readouterr()
    assert main(words) == code
    error = capsys.readouterr().err
    first, *rest = error.splitlines()
    assert first.startswith("finetune: ") and "Traceback" not in error and error.isascii()
    for words_said in said:
        assert words_said in first, first
    # Only weights that do not fit are told of in more lines: which tensors.
    assert all(line.startswith("  ") for line in rest) and (not rest or "does not fit" in first or "names, so" in first)
    left = {name for name in everything_below(tmp_path) - before if not name.endswith(("lock", "__pycache__", ".pyc"))}
    assert left == set()


def test_there_are_enough_of_them():
    assert len(MISTAKES) >= 80


def test_debug_shows_where_an_error_came_from(capsys):
    assert main(["vgg_head", "--epochs", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["vgg_head", "--epochs", "-1", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("finetune: --epochs -1")


def test_a_fault_of_our_own_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr("finetune.parsing.find_recipe_file", lambda *_: 1 / 0)
    assert main(["vgg_head"]) == 1
    assert capsys.readouterr().err == (
        "finetune: ZeroDivisionError: division by zero; this is a fault of finetune: please report it with what --debug "
        "shows\n"
    )


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint_and_names_the_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "vgg_head",
        "--lr",
        "1e30",
        "--optimizer",
        "sgd",
        "--augment",
        "light",
        "--epochs",
        "3",
        "--save-every-steps",
        "1",
    ]
    assert main([*words, "--train-samples", "100", "--device", "cpu", "--run", "run", "--log-every-steps", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the last good checkpoint is kept" in error and "run/bad_batch.json" in error
    run = RunFolder(Path("run"))
    state = read(run)
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    bad = json.loads(run.bad_batch_file.read_text())
    assert bad["step"] == state["step"] + 1 and len(bad["samples"]) in (64, 36)
    assert {"index", "name"} == set(bad["samples"][0])


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is of Linux")
def test_an_error_that_nobody_can_read_keeps_its_exit_code():
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "finetune.cli", "vgg_head", "--epochs", "-1"], stderr=full, stdout=subprocess.DEVNULL
        )
    assert found.returncode == 2


def test_in_a_terminal_too_a_wrong_option_is_one_plain_line():
    said = run_in_terminal([sys.executable, "-m", "finetune.cli", "vgg_head", "--epohcs", "3"], 80, code=2)
    assert said.startswith("finetune: Unrecognized options: --epohcs, 3; Perhaps you meant: --epochs INT")
    assert said.count("\n") == 1 and "\x1b" not in said and "│" not in said
