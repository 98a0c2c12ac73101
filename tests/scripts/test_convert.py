"""`hfkd convert stylegan2-ada`: pickles as NVlabs' code writes them become folders, and nothing in them is run."""

import json
import os
import pickle
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clean_process import run_clean
from nvlabs_pickle import discriminator_settings, nvlabs_names, persistent, write_snapshot
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hfkd.errors import InputError
from hfkd.hub.manifest import file_sha256, verify_manifest
from hfkd.models import (
    HfkdMlpConfig,
    HfkdMlpModel,
    HfkdStyleGan2DiscriminatorConfig,
    HfkdStyleGan2DiscriminatorModel,
    HfkdStyleGan2GeneratorConfig,
    HfkdStyleGan2GeneratorModel,
    stylegan2_checkpoint,
)
from hfkd.scripts.cli import main


SIZES = {"image_size": 8, "channel_base": 64, "channel_max": 6, "mapping_layers": 2}


def networks(architecture="orig", **settings):
    torch.manual_seed(0)
    generator = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig(latent_size=5, w_dim=7, **SIZES, **settings))
    discriminator = HfkdStyleGan2DiscriminatorModel(
        HfkdStyleGan2DiscriminatorConfig(architecture=architecture, mbstd_group_size=2, **SIZES, **settings)
    )
    for model in (generator, discriminator):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
    generator.mapping.w_avg.normal_()
    return generator, discriminator


def convert(file, folder):
    return main(["convert", "stylegan2-ada", str(file), str(folder)])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A snapshot and the folder that the command has made of it."""
    base = tmp_path_factory.mktemp("convert")
    generator, discriminator = networks()
    snapshot = write_snapshot(base / "network-snapshot-000200.pkl", generator, discriminator)
    assert convert(snapshot, base / "gan") == 0
    return SimpleNamespace(
        generator=generator, discriminator=discriminator, snapshot=snapshot, folder=base / "gan", base=base
    )


def assert_same_tensors(folder, model):
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is type(model)
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].is_contiguous() for name, value in expected.items())
    return loaded


def test_every_tensor_arrives_bit_by_bit(converted):
    verify_manifest(converted.folder)
    generator = assert_same_tensors(converted.folder, converted.generator)
    discriminator = assert_same_tensors(converted.folder / "discriminator", converted.discriminator)
    assert not generator.training and torch.equal(generator.sample(2, seed=1), converted.generator.sample(2, seed=1))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(discriminator(images).logits, converted.discriminator(images).logits)
    assert discriminator.config.architecture == "orig" and discriminator.config.mbstd_group_size == 2
    assert generator.config.conv_clamp == 256


@pytest.mark.parametrize(
    ("protocol", "architecture", "settings"),
    [
        (2, "orig", {}),
        (4, "resnet", {"num_classes": 3}),
        (5, "resnet", {"num_channels": 1}),
        (3, "orig", {"num_channels": 4}),  # no picture can show, nor a stock processor make these
    ],
)
def test_other_protocols_and_networks(tmp_path, protocol, architecture, settings):
    generator, discriminator = networks(architecture, **settings)
    snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator, protocol)
    assert convert(snapshot, tmp_path / "gan") == 0
    loaded = assert_same_tensors(tmp_path / "gan", generator)
    assert_same_tensors(tmp_path / "gan/discriminator", discriminator)
    assert loaded.config.num_classes == settings.get("num_classes", 0)
    assert loaded.sample(3, seed=0).shape == (3, settings.get("num_channels", 3), 8, 8)
    assert (tmp_path / "gan/samples.png").exists() == (settings.get("num_channels", 3) != 4)


def test_settings_that_are_left_out_are_the_originals_defaults(tmp_path):
    generator = HfkdStyleGan2GeneratorModel(HfkdStyleGan2GeneratorConfig(image_size=8, channel_max=6, w_dim=3))
    discriminator = networks()[1]
    changes = {"synthesis_kwargs": {"channel_max": 6}, "mapping_kwargs": {}}
    snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator, generator_changes=changes)
    assert convert(snapshot, tmp_path / "gan") == 0
    config = AutoModel.from_pretrained(tmp_path / "gan").config
    assert (config.mapping_layers, config.channel_base, config.conv_clamp) == (8, 32768, None)


def test_the_card_names_the_source_and_whose_the_weights_are(converted):
    card = (converted.folder / "README.md").read_text()
    assert file_sha256(converted.snapshot) in card and "network-snapshot-000200.pkl" in card
    assert "license: other" in card and "remain with their owner" in card and "2006.06676" in card
    assert "trained without labels" not in card and str(converted.base.parent) not in card.replace(
        str(converted.folder), ""
    )
    assert Image.open(converted.folder / "samples.png").size[0] > 200


def test_the_cards_code_runs_without_hfkd(converted, tmp_path):
    card = (converted.folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    check = "\nimport json; print(json.dumps(features.tolist()))"
    printed = run_clean("import torch; torch.set_num_threads(1)\n" + code + check, environment, tmp_path)
    with torch.no_grad():
        expected = converted.discriminator(converted.generator.sample(10, seed=0)).pooler_output
    torch.testing.assert_close(torch.tensor(json.loads(printed)), expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "sample.png").is_file()


def test_the_folder_is_one_of_ours(converted, tmp_path):
    picture = tmp_path / "grid.png"
    assert main(["sample", str(converted.folder), "--num_images", "4", "--output", str(picture)]) == 0
    assert picture.is_file()
    processor = AutoImageProcessor.from_pretrained(converted.folder / "discriminator")
    pixels = processor(Image.new("L", (20, 20), 255), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 8, 8) and pixels.min() == pixels.max() == 1


# -- refusals --------------------------------------------------------------------------------------


def refused(capsys, file, folder):
    """The command's one line, with nothing written."""
    before = sorted(folder.rglob("*")) if folder.exists() else None
    assert convert(file, folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("hfkd: error: ") and error.count("\n") == 1
    assert (sorted(folder.rglob("*")) if folder.exists() else None) == before
    assert not list(folder.parent.glob(".tmp-*"))
    return error


def test_nothing_is_overwritten(converted, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "nothing is overwritten" in refused(capsys, converted.snapshot, tmp_path / "full")
    assert "nothing is overwritten" in refused(capsys, converted.snapshot, tmp_path / "full/mine.txt")
    (tmp_path / "empty").mkdir()
    assert convert(converted.snapshot, tmp_path / "empty") == 0
    assert (tmp_path / "empty/config.json").is_file()


def test_files_that_are_no_snapshots(tmp_path, capsys):
    target = tmp_path / "gan"
    assert "cannot be read" in refused(capsys, tmp_path / "none.pkl", target)
    file = tmp_path / "file.pkl"
    for content, part in (
        ([1, 2], "holds a list and no networks"),
        ({"G": 1}, "holds no network 'G_ema'"),
        ({"G_ema": "x"}, "holds no network 'G_ema'"),
    ):
        file.write_bytes(pickle.dumps(content))
        assert part in refused(capsys, file, target)
    assert main(["convert", "stylegan3", str(file), str(target)]) == 2
    assert "stylegan2-ada" in capsys.readouterr().err


def test_code_in_the_pickle_is_refused_and_not_run(tmp_path, capsys):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    snapshot = write_snapshot(tmp_path / "snapshot.pkl", *networks(), augment_pipe=Payload())
    assert "system'" in refused(capsys, snapshot, tmp_path / "gan") and not marker.exists()


def test_pickles_of_the_tensorflow_code_are_refused_with_the_reason(tmp_path, capsys):
    file = tmp_path / "stylegan2-cifar10.pkl"
    file.write_bytes(b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81.")
    error = refused(capsys, file, tmp_path / "gan")
    assert "TensorFlow" in error and "legacy.py" in error


def test_other_structures_are_refused_by_name(tmp_path, capsys):
    generator, discriminator = networks()
    foreign = HfkdMlpModel(HfkdMlpConfig(hidden_sizes=[4], image_size=8, num_channels=1))
    cases = [
        ({"generator_changes": {"img_resolution": 16}}, "G_ema lacks tensor 'synthesis.b16.conv0.affine.bias'"),
        ({"generator_changes": {"img_resolution": 12}}, "image_size=12 must be a power of two"),
        ({"generator_changes": {"img_resolution": 2**50}}, "G_ema.img_resolution is no number up to 65536"),
        ({"generator_changes": {"img_resolution": "8"}}, "G_ema cannot be built"),
        ({"generator_changes": {"z_dim": 6}}, "mapping.fc0.weight of shape (7, 5) and torch.float32, not (7, 6)"),
        ({"generator_changes": {"style_gain": 2}}, "setting 'style_gain', which is not known here"),
        ({"generator_changes": {"synthesis_kwargs": {"architecture": "resnet"}}}, "architecture other than 'skip'"),
        ({"discriminator_changes": {"architecture": "resnet"}}, "D lacks tensor 'b8.skip.resample_filter'"),
        ({"discriminator_changes": {"cmap_dim": 512}}, "D has cmap_dim other than None"),
        (
            {"generator_changes": {"mapping_kwargs": {"num_layers": 60_000}}},
            "fewer tensors than its 60000 mapping layers",
        ),
        ({"discriminator_changes": {"architecture": None}}, "D cannot be built"),
        ({"D": None}, "holds no network 'D'"),
        ({"D": persistent(foreign, **discriminator_settings(discriminator.config))}, "D lacks tensor"),
        ({"D": persistent(generator)}, "D has no setting c_dim"),
    ]
    for changes, part in cases:
        snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator, **changes)
        assert part in refused(capsys, snapshot, tmp_path / "gan"), changes


def test_modules_that_repeat_are_refused(tmp_path, capsys):
    """Such a file could stand for far more than it holds."""
    generator, discriminator = networks()
    snapshot = tmp_path / "snapshot.pkl"
    for tie, part in (
        (lambda judge: judge.b8.__setattr__("conv0", judge.b8.conv1), "no module of its own"),
        (lambda judge: judge.b8.conv1.__setattr__("weight", judge.b8.conv0.weight), "share their values"),
    ):
        judge = persistent(discriminator, **discriminator_settings(discriminator.config))
        tie(judge)
        assert part in refused(capsys, write_snapshot(snapshot, generator, discriminator, D=judge), tmp_path / "gan")


def with_child(judge, name, tensors):
    """`judge` with one more module, which has these tensors."""
    child = persistent(torch.nn.Module())
    child.__dict__["_parameters"] = tensors
    judge.add_module(name, child)
    return child


def test_small_files_that_stand_for_much_are_refused(tmp_path, capsys):
    """By what one dictionary is when many modules have it, and one name when each level repeats it."""
    generator, discriminator = networks()
    one = torch.nn.Parameter(torch.zeros(1))
    judges = [persistent(discriminator, **discriminator_settings(discriminator.config)) for _ in range(3)]
    shared = {f"t{number}": one for number in range(200)}
    for number in range(60):
        with_child(judges[0], f"m{number}", shared)
    inner = judges[1]
    for _ in range(5):
        inner = with_child(inner, "x" * 60, {})
    judges[2]._init_args = torch.zeros(2)  # whose truth is ambiguous
    for judge, part in (
        (judges[0], "more than 10000 modules and tensors"),
        (judges[1], "longer than 200"),
        (judges[2], "D does not say by which settings"),
    ):
        snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator, D=judge)
        assert part in refused(capsys, snapshot, tmp_path / "gan")


def test_unknown_settings_are_not_gathered():
    """One dictionary of them, as the value of many others, would be as many times as large."""
    part = {f"b{inner}": 0 for inner in range(200)}
    settings = {"c_dim": 0, "img_resolution": 8, "img_channels": 3, **{f"a{outer}": part for outer in range(200)}}
    module = stylegan2_checkpoint._Persistent(state={"_init_kwargs": settings})
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="'a0.b0', which is not known"):
            stylegan2_checkpoint._settings(module, stylegan2_checkpoint._GENERATOR, "G_ema")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_weights_that_are_no_numbers_are_refused(tmp_path, capsys):
    """Training that has diverged leaves such a snapshot."""
    generator, discriminator = networks()
    generator.synthesis.b8.conv1.weight.data[0, 0, 0, 0] = float("nan")
    snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator)
    error = refused(capsys, snapshot, tmp_path / "gan")
    assert "G_ema has values in synthesis.b8.conv1.weight that are not finite" in error and "earlier" in error


def test_half_precision_tensors_are_refused(tmp_path, capsys):
    generator, discriminator = networks()
    judge = persistent(discriminator, **discriminator_settings(discriminator.config)).half()
    snapshot = write_snapshot(tmp_path / "snapshot.pkl", generator, discriminator, D=judge)
    assert "torch.float16, not" in refused(capsys, snapshot, tmp_path / "gan")


def test_a_link_to_an_empty_folder_stays_one(converted, tmp_path):
    """And the networks go where it points, which may be another disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "gan").symlink_to("large")
    assert convert(converted.snapshot, tmp_path / "gan") == 0
    assert (tmp_path / "gan").is_symlink() and (tmp_path / "large/config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gan", "large"]


def test_the_folder_one_is_in(converted, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert(converted.snapshot, Path(".")) == 0
    assert (tmp_path / "here/config.json").is_file()


def test_a_folder_whose_name_is_none(converted, tmp_path, capsys):
    assert convert(converted.snapshot, tmp_path / ("x" * 300)) == 2
    assert "File name too long" in capsys.readouterr().err


def test_the_snapshots_names_are_nowhere_to_be_imported():
    with nvlabs_names():
        assert "torch_utils.persistence" in sys.modules
    assert "torch_utils" not in sys.modules and "dnnlib" not in sys.modules


def test_a_folder_that_cannot_be_written_is_a_failure_while_running(converted, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert convert(converted.snapshot, tmp_path / "file/gan") == 1
    assert "cannot be written" in capsys.readouterr().err
