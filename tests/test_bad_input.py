"""Whatever is typed wrongly is said in one sentence that names it, with exit code 1 or 2, and nothing is left half-written."""

from pathlib import Path

import pytest
from conftest import beyond_recipe, refused, settings

from cil.checkpoint import open_run

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("line", "code", "names"),
    [
        ("measure", 2, ["give run directories", "--model timm/NAME"]),
        ("measure runs/toy --model timm/test_vit", 2, "--model"),
        ("measure runs/toy --weights w.pth", 2, "--weights"),
        ("measure runs/toy --pretrained", 2, "--pretrained"),
        ("measure runs/toy --n 0", 2, ["--n", "0"]),
        ("measure runs/toy --n -3", 2, ["--n", "-3"]),
        ("measure runs/toy --n many", 2, "many"),
        ("measure runs/toy --n 3000", 2, ["3000", "272", "digits"]),
        ("measure runs/toy --n 3 --images photos", 2, ["n=3", "2", "photos"]),
        ("measure runs/toy --seed 99999999999999999999", 2, "99999999999999999999"),
        ("measure runs/toy --task 7", 2, ["task 7", "runs/toy", "0, 1, 2"]),
        ("measure runs/toy --task -1", 2, ["task -1", "0, 1, 2"]),
        ("measure runs/toy --task one", 2, "one"),
        ("measure runs/toy/task_00.safetensors --task 0", 2, "--task"),
        ("measure --model timm/test_vit --task 0", 2, "--task"),
        ("measure runs/toy --device quantum", 2, "quantum"),
        ("measure runs/toy --device cuda:77", 2, "cuda:77"),
        ("measure runs/toy --out picture.png", 2, "picture.png is a file"),
        ("measure runs/toy --out picture.png/below/it", 2, "picture.png is a file"),
        ("measure nowhere", 1, "no run directory nowhere"),
        ("measure runs/toi", 1, ["runs/toi", "there: toy, toy-joint"]),
        ("measure runs", 1, ["runs holds no run.json", "there: toy, toy-joint"]),
        ("measure runs/toy nowhere", 1, "nowhere"),
        ("measure nowhere.pth --images x.npy", 1, "nowhere.pth"),
        ("measure picture.png --images photos", 1, "picture.png"),
        ("measure runs/toy runs/toy/task_00.safetensors", 1, "toy would be in the tables twice"),
        ("measure runs/toy --images nothing", 2, ["'nothing'", "photos"]),
        ("measure runs/toy --images nothing.npy", 1, "nothing.npy"),
        ("measure runs/toy --images picture.png", 1, "picture.png"),
        ("measure runs/toy --images digits:3", 2, "digits:3"),
        ("measure runs/toy --images folder:nowhere", 1, "nowhere does not hold train"),
        ("measure runs/toy --images cifar100 --data nowhere", 1, ["nowhere", "cifar-100-python", "--data"]),
        ("measure --model timm/vit_tny_patch16_224", 2, ["vit_tny_patch16_224", "vit_tiny_patch16_224"]),
        ("measure runs/toy --images cifar10", 2, ["'cifar10'", "cifar100"]),
        ("measure runs/toy --images some/where", 1, "'some/where'"),
        ("compare runs/toy runs/toy-joint --task 7", 2, ["task 7", "0, 1, 2"]),
        ("compare runs/toy nowhere", 1, "no run directory nowhere"),
        ("compare runs/toy runs/toy", 2, "runs/toy is given twice"),
        ("spectrum nowhere", 1, "no run directory nowhere"),
        ("spectrum runs/toy --n 3000", 2, "n=3000"),
        ("transfer nowhere", 1, "no run directory nowhere"),
        ("doctor nowhere", 1, "'nowhere'"),
        ("doctor runs", 1, ["runs holds no run.json", "there: toy, toy-joint"]),
        ("doctor --families --device cuda", 2, "--device"),
        ("sweep demo-basline", 2, "'demo-basline'"),
        ("sweep demo-baseline --set epoch=3", 2, ["'epoch'", "near: epochs"]),
        ("sweep demo-baseline --set dataset=mnist", 2, ["'mnist'", "digits, cifar100"]),
        ("reproduce --scale huge", 2, "'huge'"),
        ("measure --model timm/", 2, ["timm/", "timm/NAME"]),
        ("measure --model keras/vit_b_16", 2, "keras/vit_b_16"),
        ("measure --model timm/test_vit.nobodys_tag", 1, "nobodys_tag"),
        ("measure --model timm/test_resnet", 1, ["test_resnet", "no attention"]),
        ("measure --model timm/test_vit --weights nowhere.pth", 1, "nowhere.pth"),
        ("measure --model timm/test_vit --weights runs/toy/task_00.safetensors", 1, ["task_00", "does not fit"]),
        ("heatmap nowhere.png --ckpt runs/toy", 1, "nowhere.png"),
        ("heatmap runs --ckpt runs/toy", 1, "runs is not an image"),
        ("heatmap picture.png --ckpt nowhere", 1, "nowhere"),
        ("heatmap picture.png --ckpt runs/toy:9", 2, ["task 9", "0, 1, 2"]),
        ("heatmap picture.png --ckpt runs/toy:last", 2, ["'last'", "runs/toy", "init"]),
        ("heatmap picture.png --ckpt runs/toy:-1", 2, "'-1'"),
        ("heatmap picture.png --ckpt runs/toy/task_00.safetensors", 1, "task_00.safetensors"),
        ("heatmap picture.png --ckpt runs/toy --ckpt runs/toy:2", 1, ["toy", "task 2"]),
        ("heatmap picture.png --ckpt runs/toy --model timm/test_vit", 2, "--ckpt or --model"),
        ("heatmap picture.png --ckpt runs/toy --weights w.pth", 2, "--weights"),
        ("heatmap picture.png --ckpt runs/toy --layer 3", 2, ["layer 3", "0, 1, 2"]),
        ("heatmap picture.png --ckpt runs/toy --layer -1", 2, "layer='-1'"),
        ("heatmap picture.png --ckpt runs/toy --layer deep", 2, "layer='deep'"),
        ("heatmap picture.png --ckpt runs/toy --layer 2", 2, ["layer 2", "0, 1"]),
        ("heatmap picture.png --ckpt runs/toy --layer 1 --query cls", 2, ["layer 1", "class token"]),
        ("heatmap picture.png --ckpt runs/toy --head 4", 2, ["head 4", "0 to 3"]),
        ("heatmap picture.png --ckpt runs/toy --head -1", 2, "head -1"),
        ("heatmap picture.png --ckpt runs/toy --head ²", 2, "head ²"),
        ("heatmap picture.png --ckpt runs/toy --query 8,0", 2, ["8, 0", "8 x 8"]),
        ("heatmap picture.png --ckpt runs/toy --query centre", 2, ["'centre'", "ROW,COLUMN"]),
        ("heatmap picture.png --ckpt runs/toy --layer 7", 2, ["layer 7", "0, 1, 2"]),
        ("heatmap picture.png --ckpt runs/toy --head 99", 2, ["head 99", "0 to 3"]),
        ("heatmap picture.png --ckpt runs/toy --query pixel:99,0", 2, ["pixel 99,0", "33 rows"]),
        ("heatmap picture.png --ckpt runs/toy --difference", 2, "of two checkpoints, and there are 1"),
        ("heatmap picture.png --model torchvision/vit_b_17", 2, ["vit_b_17", "vit_b_16"]),
        ("heatmap picture.png --model hf/nowhere", 1, "nowhere is no folder"),
        ("heatmap picture.png --ckpt runs/toy --query 3", 2, ["'3'", "ROW,COLUMN"]),
        ("heatmap picture.png --ckpt runs/toy --query -1,0", 2, "'-1,0'"),
        ("heatmap picture.png --ckpt runs/toy --query 1.5,0", 2, "'1.5,0'"),
        ("heatmap picture.png --ckpt runs/toy --scale log", 2, "log"),
        ("heatmap picture.png --ckpt runs/toy -o out.jpg", 2, ["out.jpg", ".png, .svg, .pdf"]),
        ("heatmap picture.png --ckpt runs/toy -o out", 2, "'out'"),
        ("heatmap picture.png --ckpt runs/toy -o picture.png/out.png", 2, "picture.png is a file"),
        ("heatmap picture.png --model timm/test_resnet", 1, ["test_resnet", "no attention"]),
        ("heatmap picture.png --model timm/nobodys_vit", 2, "nobodys_vit"),
        ("heatmap picture.png --model test_vit", 2, "'test_vit'"),
    ],
)
def test_commands(runs, picture, line, code, names):
    refused(*line.split(), code=code, names=names)


def test_demo_into_a_file(picture):
    refused("demo", "--out", picture, code=2, names="picture.png is a file")


@pytest.mark.parametrize("spec", ["", ":"])
def test_empty_names(runs, picture, spec):
    refused("heatmap", picture, "--ckpt", spec)
    refused("measure", spec)


def test_without_any_model_heatmap_says_what_to_do(picture):
    refused("heatmap", picture, code=2, names=["--ckpt RUN_DIR", "--model timm/NAME", "locality-probe demo"])


@pytest.mark.parametrize(
    ("line", "code", "names"),
    [
        ("demo-basline", 2, ["'demo-basline'", "demo-baseline"]),
        ("demo-baseline --set epoch=3", 2, ["'epoch'", "near: epochs"]),
        ("demo-baseline --set zzz=3", 2, ["'zzz'", "epochs"]),
        ("demo-baseline --set epochs", 2, "'epochs' is not key=value"),
        ("demo-baseline --set epochs=three", 2, ["epochs='three'", "int"]),
        ("demo-baseline --set epochs=1.5", 2, "epochs='1.5'"),
        ("demo-baseline --set lr=fast", 2, ["lr='fast'", "float"]),
        ("demo-baseline --set flip=perhaps", 2, "flip='perhaps'"),
        ("demo-baseline --set method=icarl", 2, ["method='icarl'", "baseline, dytox"]),
        ("demo-baseline --set epochs=0", 2, "epochs=0"),
        ("demo-baseline --set memory=-1", 2, "memory=-1"),
        ("demo-baseline --set dim=10", 2, ["dim=10", "num_heads=9"]),
        ("demo-baseline --set n_lpa=4", 2, "n_lpa=4"),
        ("demo-baseline --set patch_size=3", 1, ["patch_size=3", "8, 8"]),
        ("demo-baseline --set image_size=16", 1, ["image_size=16", "8, 8"]),
        ("demo-baseline --set scenario=B0-0", 2, ["B0-0", "B10-10"]),
        ("demo-baseline --set scenario=foo", 2, "foo"),
        ("demo-baseline --set scenario=B20-2", 1, ["B20-2", "10"]),
        ("demo-baseline --set num_classes=11", 1, ["num_classes=11", "10"]),
        ("demo-baseline --set class_order=icarl", 1, "class_order=icarl"),
        ("demo-baseline --set model=timm/vit_tny", 2, "timm has no model 'vit_tny'"),
        ("demo-baseline --set dataset=folder:", 2, ["'folder:'", "folder:PATH"]),
        ("demo-baseline --set dataset=mnist", 2, ["'mnist'", "digits, cifar100"]),
        ("demo-baseline --set dataset=folder:nowhere", 1, "nowhere"),
        ("demo-baseline --device quantum", 2, "quantum"),
        ("demo-baseline --threads 0", 2, ["--threads", "0"]),
        ("demo-baseline --download", 2, ["--download", "digits"]),
        ("demo-baseline --out file", 2, "file is a file"),
        ("demo-baseline --out file/below", 2, "file is a file"),
        ("demo-baseline --out foreign", 1, ["foreign is not empty", "--out"]),
        ("demo-baseline --out runs/toy", 1, ["runs/toy holds another run", "dim=24 there, 36 asked"]),
        ("paper-b10-10-baseline", 1, ["no CIFAR-100 in data", "--data", "--download"]),
        ("paper-b10-10-baseline --data file", 1, "no CIFAR-100 in file"),
        ("paper-b10-10-baseline --dry-run --data foreign", 1, "no CIFAR-100 in foreign"),
    ],
)
def test_train(runs, line, code, names):
    Path("file").touch()
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").touch()
    arguments = line.split()
    refused("train", *arguments, *([] if "--out" in arguments else ["--out", "out"]), code=code, names=names)


def test_two_trainers_in_one_directory(runs, toy):
    with open_run("runs/toy").lock():
        options = settings(beyond_recipe(toy))
        refused(
            "train", "demo-baseline", *options, "--out", "runs/toy", names="another process is training in runs/toy"
        )
        refused("train", "demo-baseline-joint", *options, "--out", "runs/toy", names="training=incremental there")
