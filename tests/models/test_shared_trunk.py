"""Networks that share their trunk: each stays what its plain forward pass says, and the rest is refused."""

import copy

import pytest
import torch
from tiny_classifiers import FAMILIES
from torch import nn

from hfkd.errors import InputError
from hfkd.models import ClassifierAdapter, HfkdResNetConfig, HfkdResNetForImageClassification
from hfkd.models.shared_trunk import SharedTrunk


WORKING = ("hfkd_resnet", "hfkd_wide_resnet", "resnet", "convnext")
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def networks(family, count=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [FAMILIES[family]() for _ in range(count)]
        for model in made:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return made


def adapters(models):
    return [ClassifierAdapter(model) for model in models]


def same(a, b, atol=0.0):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("family", WORKING)
@pytest.mark.parametrize("training", [False, True])
def test_a_branch_gives_what_its_network_gives(family, training):
    models = networks(family, 3)
    trunk = SharedTrunk(adapters(models))
    for model in models:
        model.train(training)
    shared = trunk(PIXELS)
    for features, model in zip(shared, models, strict=True):
        same(features, ClassifierAdapter(model)(PIXELS), atol=1e-5)
        torch.testing.assert_close(features.logits, model(PIXELS).logits, rtol=0, atol=1e-5)
    assert shared.trunk.shape[1] == trunk.channels
    assert not torch.allclose(shared[0].logits, shared[1].logits)


@pytest.mark.parametrize("family", WORKING)
def test_what_is_shared_is_all_below_the_last_stage(family):
    models = networks(family)
    before = copy.deepcopy(models)
    SharedTrunk(adapters(models))
    first, second = (dict(model.named_parameters()) for model in models)
    shared = {name for name in first if first[name] is second[name]}
    last = max(name.split("stages.")[1].split(".")[0] for name in first if "stages." in name)
    above = {n for n in first if f"stages.{last}." in n or n.startswith("classifier") or ".tail." in n}
    above |= {name for name in first if ".layernorm." in name and "embeddings" not in name and "stages" not in name}
    assert shared == first.keys() - above and shared and above
    # The first network is as it was; the others keep their branches.
    same(models[0].parameters(), before[0].parameters())
    theirs = dict(before[1].named_parameters())
    assert all(torch.equal(second[name], theirs[name]) for name in above)


def test_the_trunk_runs_once_and_gets_the_gradient_of_every_branch():
    models = networks("hfkd_resnet", 3)
    trunk, runs = SharedTrunk(adapters(models)), []
    models[0].base_model.stem.register_forward_hook(lambda *_: runs.append(1))
    shared = trunk(PIXELS)
    assert runs == [1]
    stem = models[0].base_model.stem[0].weight
    for features in shared:
        (gradient,) = torch.autograd.grad(features.logits.sum(), stem, retain_graph=True)
        assert gradient.abs().sum() > 0
    for k, features in enumerate(shared):
        others = [p for j in range(3) if j != k for p in models[j].base_model.stages[-1].parameters()]
        found = torch.autograd.grad(features.logits.sum(), others, retain_graph=True, allow_unused=True)
        assert all(gradient is None for gradient in found)


def test_the_tie_survives_a_move_and_a_copy():
    models = networks("resnet")
    SharedTrunk(adapters(models))
    together = nn.ModuleList(models).double()
    count = len(list(together.parameters()))
    assert together[0].resnet.embedder is together[1].resnet.embedder
    copied = copy.deepcopy(together)
    assert copied[0].resnet.embedder is copied[1].resnet.embedder is not together[0].resnet.embedder
    assert len(list(copied.parameters())) == count < 2 * len(list(models[0].parameters()))


def test_each_network_is_saved_whole(tmp_path):
    models = networks("hfkd_resnet")
    SharedTrunk(adapters(models))
    for k, model in enumerate(models):
        model.eval().save_pretrained(tmp_path / str(k))
        again = HfkdResNetForImageClassification.from_pretrained(tmp_path / str(k))
        same(again.eval()(PIXELS).logits, model(PIXELS).logits, atol=1e-6)


def test_branches_may_be_of_different_depth():
    models = [
        HfkdResNetForImageClassification(HfkdResNetConfig(depths=[1, 1, depth], num_labels=5)) for depth in (1, 2)
    ]
    shared = SharedTrunk(adapters(models))(PIXELS)
    torch.testing.assert_close(shared[1].logits, models[1](PIXELS).logits, rtol=0, atol=1e-5)


def different():
    return [networks("hfkd_resnet")[0], networks("hfkd_wide_resnet")[0]]


def wider():
    return [
        HfkdResNetForImageClassification(
            HfkdResNetConfig(hidden_sizes=[16, width, 64], depths=[1, 1, 1], num_labels=5)
        )
        for width in (32, 16)
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (different, "not of one architecture"),
        (wider, "not of one architecture"),
        (lambda: networks("vit"), "list of two or more stages"),
        (lambda: networks("mobilenet_v2"), "list of two or more stages"),
    ],
    ids=["different families", "different widths", "vit", "mobilenet"],
)
def test_other_networks_are_refused(make, reason):
    models = make()
    with pytest.raises(InputError, match=reason) as caught:
        SharedTrunk(adapters(models))
    assert "shared_trunk=False" in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_whose_head_reads_more_is_refused_and_left_alone():
    models = networks("hfkd_resnet")

    made = adapters(models)
    models[1].base_model.register_forward_hook(_add_one)
    before = [id(module) for module in models[1].modules()]
    with pytest.raises(InputError, match="does not read the output of its last stage"):
        SharedTrunk(made)
    assert [id(module) for module in models[1].modules()] == before


def _add_one(module, args, output):
    output.pooler_output = output.pooler_output + 1
    return output
