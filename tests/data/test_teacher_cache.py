"""A teacher's logits on disk: the whole is the teacher, and the top k says what it leaves out."""

import json
import math

import pytest
import torch

from hfkd.data import Augmentation, Preprocessing, ResidentImages, StreamedImages
from hfkd.data.teacher_cache import TeacherCache, open_teacher_cache
from hfkd.errors import InputError


IDENTITY = {"teacher weights": "w", "precision": "no"}
EVERYTHING = torch.arange(50)


@pytest.fixture(scope="module")
def digit_rows(digits):
    return digits.select(range(50))


@pytest.fixture(params=[ResidentImages, StreamedImages])
def source(request, digit_rows, digit_columns):
    return request.param(digit_rows, digit_columns, Preprocessing(8, 1))


@pytest.fixture
def resident(digit_rows, digit_columns):
    return ResidentImages(digit_rows, digit_columns, Preprocessing(8, 1))


def teacher(classes=20, dtype=torch.float32, scale=1.0):
    """A linear teacher on pixels, (N, 1, 8, 8) to (N, `classes`)."""
    weight = scale * torch.randn(64, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda pixels: (pixels.flatten(1).double() @ weight).to(dtype)


def encoder(source, model, stop_after=None):
    """It counts its batches in `calls`."""

    def encode(inputs):
        encode.calls += 1
        if stop_after is not None and encode.calls > stop_after:
            raise KeyboardInterrupt
        return model(source.materialise(inputs)["pixel_values"])

    encode.calls = 0
    return encode


def filled(folder, source, model=None, stop_after=None, identity=IDENTITY, **settings):
    encode = encoder(source, model or teacher(), stop_after)
    return open_teacher_cache(folder, source, encode, identity, batch_size=16, **settings)


def live(resident, model):
    return model(resident.preprocessing.normalize(resident.images))


# -- all classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_whole_cache_is_the_teacher(tmp_path, source, resident, dtype):
    cache = filled(tmp_path / "cache", source, teacher(dtype=dtype))
    index = torch.tensor([49, 3, 3, 0])
    assert len(cache) == 50 and cache.top_k is None
    assert cache.gather(index).dtype == dtype
    # A product of another batch size rounds otherwise.
    torch.testing.assert_close(cache.gather(index), live(resident, teacher(dtype=dtype))[index])


def test_filling_draws_nothing(tmp_path, resident):
    before = torch.get_rng_state()
    filled(tmp_path / "cache", resident)
    assert torch.equal(torch.get_rng_state(), before)


def test_is_filled_once_and_starts_again_when_interrupted(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", source, stop_after=2)
    with pytest.raises(InputError, match="teacher_cache_dir=.* is damaged .*: delete the folder or name another"):
        TeacherCache(tmp_path / "cache")
    first = filled(tmp_path / "cache", source).gather(EVERYTHING)
    again = filled(tmp_path / "cache", source, stop_after=0).gather(EVERYTHING)
    assert torch.equal(first, again)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["key.json", "logits.npy"]


def test_names_what_changed(tmp_path, source, digits, digit_columns, digit_rows):
    filled(tmp_path / "cache", source)
    kind = type(source)
    other_images = kind(digits.select(range(1, 51)), digit_columns, Preprocessing(8, 1))
    other_values = kind(digit_rows, digit_columns, Preprocessing(8, 1, std=(0.3,)))
    other_size = kind(digit_rows, digit_columns, Preprocessing(6, 1))
    for changed, images, settings in (
        ("teacher weights", source, {"identity": IDENTITY | {"teacher weights": "x"}}),
        ("precision", source, {"identity": IDENTITY | {"precision": "bf16"}}),
        ("top_k", source, {"top_k": 3}),
        ("images", other_images, {}),
        ("preprocessing", other_values, {}),
    ):
        with pytest.raises(InputError, match=f"made with other {changed}: delete the folder or name another"):
            filled(tmp_path / "cache", images, **settings)
    with pytest.raises(InputError, match="made with other .*preprocessing"):
        filled(tmp_path / "cache", other_size)


def test_augmented_images_are_refused(tmp_path, resident):
    for settings in ({"augmentation": Augmentation(horizontal_flip=True)}, {"views": 2}):
        with pytest.raises(InputError, match="teacher_cache_dir needs images that are the same in every epoch"):
            filled(tmp_path / "cache", resident.variant(**settings))
    assert not (tmp_path / "cache").exists()


def cut_off(folder):
    content = (folder / "logits.npy").read_bytes()
    (folder / "logits.npy").write_bytes(content[:-100])


DAMAGE = {
    "no logits": lambda folder: (folder / "logits.npy").unlink(),
    "cut off": cut_off,
    "no key": lambda folder: (folder / "key.json").write_text("{"),
    "key of something else": lambda folder: (folder / "key.json").write_text(
        json.dumps({"shape": [50, 20], "dtype": "float32"})
    ),
}


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_a_damaged_cache(tmp_path, resident, damage, top_k):
    filled(tmp_path / "cache", resident, top_k=top_k)
    DAMAGE[damage](tmp_path / "cache")
    with pytest.raises(InputError, match="is damaged .*: delete the folder or name another") as error:
        filled(tmp_path / "cache", resident, top_k=top_k)
    assert "\n" not in str(error.value)


# -- top k classes ---------------------------------------------------------------------------------------------------


def given(logits):
    """A teacher that knows its answers by heart."""
    return lambda pixels: logits.expand(len(pixels), *logits.shape)


def test_a_row_by_hand(tmp_path, resident):
    logits = torch.tensor([0.0, 3.0, math.log(2), 5.0, 0.0])  # the rest: 1 + 2 + 1 = 4 in three classes
    cache = filled(tmp_path / "cache", resident, given(logits), top_k=2)
    share = math.log(4 / 3)
    expected = torch.tensor([[share, 3.0, share, 5.0, share]])
    torch.testing.assert_close(cache.gather(torch.tensor([7])), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_classes_keep_their_probability(tmp_path, resident, dtype):
    model = teacher(dtype=dtype)
    cache = filled(tmp_path / "cache", resident, model, top_k=5)
    kept, exact = cache.gather(EVERYTHING), live(resident, model)
    assert cache.top_k == 5 and kept.dtype == dtype and kept.shape == (50, 20)
    top = kept.float().topk(5, dim=-1).indices  # bfloat16 has ties, of which the one that is kept counts
    probabilities, expected = (x.double().softmax(-1).gather(-1, top) for x in (kept, exact))
    # float16 of logits up to 32 is right to 0.008, and bfloat16 itself to 0.06.
    torch.testing.assert_close(probabilities, expected, rtol=0.1 if dtype == torch.bfloat16 else 0.02, atol=1e-6)
    others = kept.scatter(-1, top, -math.inf).sort(dim=-1, descending=True).values[:, :15]
    assert torch.equal(others, others[:, :1].expand_as(others))


def test_float16_is_the_finer_of_the_two(resident):
    logits = live(resident, teacher())
    assert 8 < logits.abs().max() < 32
    errors = {kind: (logits.to(kind).float() - logits).abs().max() for kind in (torch.float16, torch.bfloat16)}
    assert errors[torch.float16] <= 0.008 < 4 * errors[torch.float16] < errors[torch.bfloat16] <= 0.0625


def test_a_softened_target_is_a_little_flatter_never_sharper(tmp_path, resident):
    model = teacher(dtype=torch.float64, scale=0.3)
    kept = filled(tmp_path / "cache", resident, model, top_k=3).gather(EVERYTHING)
    exact = live(resident, model)
    top = exact.topk(3, dim=-1).indices
    left = [1 - (x / 4).softmax(-1).gather(-1, top).sum(-1) for x in (kept, exact)]
    assert (left[0] >= left[1] - 1e-3).all() and (left[0] > left[1]).any()


@pytest.mark.parametrize("top_k", [1, 16])
def test_a_thousand_classes_stay_within_the_stated_size(tmp_path, resident, top_k):
    cache = filled(tmp_path / "cache", resident, teacher(1000), top_k=top_k)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    stated = len(resident) * (4 * top_k + 4)
    assert stated < size < stated + 4096
    assert cache.gather(EVERYTHING).shape == (50, 1000)


def test_teachers_that_are_kept_apart(tmp_path, resident):
    """(N, T, K): each by itself, as if it were alone."""
    models = [teacher(), teacher(scale=0.5)]
    for top_k in (None, 4):
        both = filled(
            tmp_path / f"both-{top_k}", resident, lambda x: torch.stack([m(x) for m in models], dim=1), top_k=top_k
        )
        for number, model in enumerate(models):
            alone = filled(tmp_path / f"{number}-{top_k}", resident, model, top_k=top_k)
            torch.testing.assert_close(both.gather(EVERYTHING)[:, number], alone.gather(EVERYTHING))


@pytest.mark.parametrize("top_k", [0, 20, 21])
def test_refuses_a_k_out_of_range(tmp_path, resident, top_k):
    with pytest.raises(InputError, match=f"teacher_cache_top_k={top_k} of 20 classes: choose 1 to 19"):
        filled(tmp_path / "cache", resident, top_k=top_k)


@pytest.mark.parametrize("value", [1e5, math.inf, math.nan])
def test_refuses_logits_that_float16_cannot_hold(tmp_path, resident, value):
    with pytest.raises(InputError, match="keeps logits in float16, and one is .*: leave it out"):
        filled(tmp_path / "cache", resident, given(torch.tensor([value, 0.0, 1.0])), top_k=1)
