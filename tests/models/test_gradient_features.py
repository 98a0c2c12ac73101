"""Gradient features against their definitions, in float64: derivatives, identities, folding and scaling."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from gradient_models import BASES, build, set_weights, trained_looking, weights
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel


IMAGES = (3, 3, 32, 32)
SMOOTH = ("convnext", "vit")


@pytest.fixture(params=BASES)
def base(request):
    return trained_looking(request.param)


@pytest.fixture
def images():
    return torch.randn(IMAGES, dtype=torch.float64)


def random_weights(model):
    values = [torch.randn_like(parameter) for parameter in weights(model)]
    set_weights(model, values)
    return torch.cat([value.flatten() for value in values])


def gradient_logits(model, images):
    """omega^T J(x) w2, (N, c)."""
    return F.linear(model.backbone(images).tangent, model.omega)


# -- the directional derivative --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_directional_derivative_is_the_product_with_explicit_gradients(base, images, blocks):
    """T2, and T3: its gradient by w2."""
    model = build(base, blocks)
    w2 = random_weights(model)
    explicit = model.explicit_features(images)
    logits = gradient_logits(model, images)
    assert torch.allclose(logits, explicit @ w2, rtol=0, atol=1e-11 * float(logits.detach().abs().max()))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * logits.square().sum(), weights(model))])
    expected = torch.einsum("ncp,nc->p", explicit, explicit @ w2)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_chain_of_convolutions_follows_the_papers_rules(images, blocks):
    """T1: equations 6 and 7, by hand."""
    base = trained_looking("convnet")
    model = build(base, blocks)
    random_weights(model)
    direction = model.backbone.direction()
    folded = dict(model.backbone.base.named_parameters())
    config = base.config
    value, tangent = images, None
    for layer, stride in enumerate(config.strides):
        first_of_theta2 = len(config.strides) - blocks
        name = next(
            n for n in folded if n.startswith(f"backbone.stages.{layer}.") or n.startswith(f"backbone.layers.{layer}.")
        )
        stem = name.rpartition(".")[0]
        before = F.conv2d(value, folded[f"{stem}.weight"], folded[f"{stem}.bias"], stride)
        if layer >= first_of_theta2:
            moved = F.conv2d(value, direction[f"{stem}.weight"], direction[f"{stem}.bias"], stride)
            if tangent is not None:
                moved = moved + F.conv2d(tangent, folded[f"{stem}.weight"], None, stride)
            slope = torch.where(before > 0, torch.ones_like(before), config.negative_slope)
            tangent = slope * moved
        value = F.leaky_relu(before, config.negative_slope)
    outputs = model.backbone(images)
    assert torch.allclose(outputs.pooler_output, value.mean((2, 3)), rtol=0, atol=1e-12)
    assert torch.allclose(outputs.tangent, tangent.mean((2, 3)), rtol=0, atol=1e-12)


def test_value_and_tangent_are_those_of_forward_mode(base, images):
    """T16, and T1 for every family: features first, omega afterwards, equals the derivative of the logits."""
    model = build(base)
    random_weights(model)
    theta2 = {name: p.detach() for name, p in model.backbone.theta2().items()}
    with sdpa_kernel(SDPBackend.MATH):
        logits, moved = jvp(
            lambda at: F.linear(model.backbone.features_at(at, images), model.omega, model.omega_bias),
            (theta2,),
            (model.backbone.direction(),),
        )
    outputs = model.backbone(images)
    assert torch.allclose(F.linear(outputs.pooler_output, model.omega, model.omega_bias), logits, rtol=0, atol=1e-12)
    assert torch.allclose(F.linear(outputs.tangent, model.omega), moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_remainder_of_the_expansion_is_of_second_order(name, images):
    """T4."""
    model = build(trained_looking(name), 1)
    random_weights(model)
    theta2, direction = model.backbone.theta2(), model.backbone.direction()
    outputs = model.backbone(images)
    with torch.no_grad():
        remainders = [
            (
                model.backbone.features_at({n: theta2[n] + r * direction[n] for n in theta2}, images)
                - outputs.pooler_output
                - r * outputs.tangent
            )
            .abs()
            .max()
            for r in (1e-3, 1e-4, 1e-5)
        ]
    for larger, smaller in pairwise(remainders):
        assert 80 < larger / smaller < 120


def test_one_convolution_is_linear_between_kinks(images):
    """T4 for K = 1 with piecewise linear activations: no remainder."""
    model = build(trained_looking("convnet"), 1)
    random_weights(model)
    theta2, direction = model.backbone.theta2(), model.backbone.direction()
    outputs = model.backbone(images)
    moved = model.backbone.features_at({n: theta2[n] + 1e-8 * direction[n] for n in theta2}, images)
    remainder = moved - outputs.pooler_output - 1e-8 * outputs.tangent
    assert remainder.abs().max() < 1e-16 * 100


def test_full_expansion_in_head_and_layers(base, images):
    """T5, equation 3: F(theta2, omega) + dF/d omega (w1 - omega) + dF/d theta2 w2 is the classifier."""
    model = build(base, ntk="none")
    random_weights(model)
    shift, bias_shift = torch.randn_like(model.omega), torch.randn_like(model.omega_bias)
    with torch.no_grad():
        model.activation_weight += shift
        model.activation_bias += bias_shift
    theta2 = {name: p.detach() for name, p in model.backbone.theta2().items()}

    def network(at, weight, bias):
        return F.linear(model.backbone.features_at(at, images), weight, bias)

    with sdpa_kernel(SDPBackend.MATH):
        value, derivative = jvp(
            network, (theta2, model.omega, model.omega_bias), (model.backbone.direction(), shift, bias_shift)
        )
    assert torch.allclose(model(images).logits, value + derivative, rtol=0, atol=1e-12)


def test_direction_is_linear(base, images):
    """T10."""
    model = build(base)
    u, v = ([torch.randn_like(p) for p in weights(model)] for _ in range(2))
    tangents = []
    for values in (u, v, [2 * a - 3 * b for a, b in zip(u, v, strict=True)]):
        set_weights(model, values)
        tangents.append(model.backbone(images).tangent.detach())
    assert torch.allclose(tangents[2], 2 * tangents[0] - 3 * tangents[1], rtol=1e-12, atol=1e-12)


def test_loss_is_convex_in_the_trained_weights(images):
    """T10."""
    model = build(trained_looking("hfkd_resnet"), 2)
    labels = torch.tensor([0, 3, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    ends = [[p + torch.randn_like(p) for p in trained] for _ in range(2)]
    losses = []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        with torch.no_grad():
            for parameter, a, b in zip(trained, *ends, strict=True):
                parameter.copy_((1 - t) * a + t * b)
            losses.append(float(model(images, labels=labels).loss))
    for middle in (1, 2, 3):
        t = middle / 4
        assert losses[middle] < (1 - t) * losses[0] + t * losses[4]


def test_one_w2_serves_all_classes_through_omega(base, images):
    """T11: another omega for class 2 changes the gradient term of class 2 alone."""
    model = build(base)
    random_weights(model)
    before = model(images).logits
    with torch.no_grad():
        model.omega[2] += torch.randn_like(model.omega[2])
    after = model(images).logits
    others = [0, 1, 3, 4]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.allclose(before[:, 2], after[:, 2])


# -- where training starts -------------------------------------------------------------------------------------------


def test_starts_at_the_classifier_on_activations(base, images):
    """T7: with the base's own classifier as omega, the base's own logits; T6: exactly those of mode activation."""
    model, activation = build(base), build(base, mode="activation", ntk="none")
    assert torch.allclose(model(images).logits, base(images).logits, rtol=0, atol=1e-12)
    w1, b1 = torch.randn_like(model.omega), torch.randn_like(model.omega_bias)
    plain = build(base, ntk_head=False)
    for other in (plain, activation):
        with torch.no_grad():
            other.activation_weight.copy_(w1)
            other.activation_bias.copy_(b1)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels round otherwise
        assert torch.equal(plain(images).logits, activation(images).logits)
    assert not build(base, mode="gradient")(images).logits.any()


def step_of_sgd(model, images, labels):
    """The loss before, and by how much the trained parameters move."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    loss = model(images, labels=labels).loss
    loss.backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    return loss.detach(), {n: p.detach() - before[n] for n, p in trained.items()}


def test_first_step_is_that_of_fine_tuning(base, images):
    """T8: equal losses, and one step of SGD moves w1 as the head and w2 as the layers, which start at theta2."""
    labels = torch.tensor([4, 0, 2])
    linear, tuned = build(base, 2, ntk="none"), build(base, 2, mode="finetune")
    (loss, ours), (tuned_loss, theirs) = (step_of_sgd(model, images, labels) for model in (linear, tuned))
    assert torch.allclose(loss, tuned_loss, rtol=0, atol=1e-12)
    ours = {n: moved for n, moved in ours.items() if "gradient_weights" not in n}
    ours |= {f"backbone.base.{n}": moved.detach() for n, moved in linear.backbone.direction().items()}
    assert ours.keys() == theirs.keys()
    for name, moved in theirs.items():
        assert torch.allclose(ours[name], moved, rtol=0, atol=1e-11 * float(moved.abs().max()) + 1e-14), name
    assert any(moved.abs().max() > 1e-6 for n, moved in theirs.items() if "backbone.base." in n)


def test_gradients_contain_the_activations(images):
    """T9, Euler: w2 = theta2 of a top convolution gives omega^T f, the logits without bias."""
    model = build(trained_looking("convnet"), 1)
    theta2, scales = model.backbone.theta2(), model.backbone.scales
    set_weights(model, [theta2[name] / scales[name] for name in theta2])
    expected = F.linear(model.backbone.features(images), model.omega)
    assert torch.allclose(gradient_logits(model, images), expected, rtol=0, atol=1e-13)


def test_kernel_is_that_of_the_explicit_features(images):
    """T17: symmetric, positive semi-definite, and kernel ridge regression equals ridge on explicit features."""
    model = build(trained_looking("convnet"), 1)
    kernel = model.ntk_matrix(images)
    explicit = model.explicit_features(images)
    assert torch.allclose(kernel, torch.einsum("ncp,mcp->nm", explicit, explicit))
    assert torch.equal(kernel, kernel.T)
    assert torch.linalg.eigvalsh(kernel).min() > -1e-10 * kernel.trace()
    rows, targets = explicit.flatten(0, 1), torch.randn(3, 5, dtype=torch.float64)
    dual = rows.T @ torch.linalg.solve(rows @ rows.T + 0.1 * torch.eye(15), targets.flatten())
    primal = torch.linalg.solve(rows.T @ rows + 0.1 * torch.eye(rows.shape[1]), rows.T @ targets.flatten())
    set_weights(
        model,
        [
            part.view_as(p)
            for part, p in zip(dual.split([p.numel() for p in weights(model)]), weights(model), strict=True)
        ],
    )
    assert torch.allclose(dual, primal, rtol=0, atol=1e-9)
    assert torch.allclose(gradient_logits(model, images).flatten(), rows @ primal, rtol=0, atol=1e-9)


# -- folding and scaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["convnet", "hfkd_resnet", "hfkd_wide_resnet", "resnet", "mobilenet_v2"])
def test_folding_leaves_the_function_as_it_was(name, images, dtype, tolerance):
    """T12."""
    base = trained_looking(name).to(dtype)
    model = build(base)
    norms = [m for m in model.backbone.base.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) < sum(isinstance(m, torch.nn.BatchNorm2d) for m in base.modules())
    logits = base(images.to(dtype)).logits
    assert torch.allclose(
        model(images.to(dtype)).logits, logits, rtol=0, atol=tolerance * float(logits.detach().abs().max())
    )


def test_folded_and_unfolded_tangents_correspond(images):
    """T12, section 1.4: W~' = gamma/sigma W~ + gamma~/sigma W and b~' = beta~ - mean gamma~/sigma act alike."""
    base = trained_looking("convnet")
    folded, unfolded = build(base, 1, ntk="none"), build(base, 1, ntk="none", fold_batch_norm=False)
    random_weights(unfolded)
    (conv, norm), direction = folded.config.folded[-1], unfolded.backbone.direction()
    layer, weight = base.get_submodule(norm), base.get_parameter(f"{conv}.weight")
    sigma = (layer.running_var + layer.eps).sqrt()
    over = lambda vector: vector[:, None, None, None]  # noqa: E731
    moved = {
        f"{conv}.weight": over(layer.weight / sigma) * direction[f"{conv}.weight"]
        + over(direction[f"{norm}.weight"] / sigma) * weight,
        f"{conv}.bias": direction[f"{norm}.bias"] - layer.running_mean * direction[f"{norm}.weight"] / sigma,
    }
    set_weights(folded, [moved[name] for name in folded.config.theta2])
    assert torch.allclose(folded.backbone(images).tangent, unfolded.backbone(images).tangent, rtol=0, atol=4e-14)


@pytest.mark.parametrize("ntk", ["fan_out", "fan_in"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_scaled_weights_are_a_choice_of_learning_rates(images, ntk, optimizer):
    """T13, section 1.5: SGD with rate s^2 lr and decay wd / s^2, Adam with rate s lr and eps / s, unscaled."""
    labels = torch.tensor([1, 1, 3])
    base = trained_looking("convnet")
    scaled, plain = build(base, 2, ntk=ntk), build(base, 2, ntk="none")
    scales = [scaled.weight_scale, scaled.bias_scale, *scaled.backbone.scales.values()]
    groups = {}
    for model, factors in ((scaled, [1.0] * len(scales)), (plain, scales)):
        parameters = [model.activation_weight, model.activation_bias, *weights(model)]
        if optimizer == "sgd":
            settings = [{"lr": 0.1 * s * s, "weight_decay": 1e-2 / s**2, "momentum": 0.9} for s in factors]
            kind = torch.optim.SGD
        else:
            settings = [{"lr": 1e-2 * s, "eps": 1e-8 / s} for s in factors]
            kind = torch.optim.Adam
        groups[model] = kind([{"params": [p], **how} for p, how in zip(parameters, settings, strict=True)])
    for _ in range(4):
        for model, steps in groups.items():
            steps.zero_grad()
            model(images, labels=labels).loss.backward()
            steps.step()
    assert torch.allclose(scaled(images).logits, plain(images).logits, rtol=0, atol=1e-12)
    for name, weight in plain.backbone.gradient_weights.named_parameters():
        assert torch.allclose(scaled.backbone.direction()[name], weight, rtol=0, atol=1e-13)


def test_scales_are_the_documents():
    model = build(trained_looking("resnet"), 1)
    by_name = model.backbone.scales
    assert by_name["resnet.encoder.stages.1.layers.1.layer.0.convolution.weight"] == 16**-0.5
    assert by_name["resnet.encoder.stages.1.layers.1.layer.0.convolution.bias"] == 0.1**0.5
    assert (model.weight_scale, model.bias_scale) == (5**-0.5, 0.1**0.5)
    fan_in = build(trained_looking("resnet"), 1, ntk="fan_in").backbone.scales
    assert fan_in["resnet.encoder.stages.1.layers.1.layer.0.convolution.weight"] == (16 * 9) ** -0.5


# -- state -----------------------------------------------------------------------------------------------------------


def test_omega_is_a_copy_that_training_leaves_alone(images):
    """The authors' code shares memory between omega and w1 on a CPU (document, D1)."""
    model = build(trained_looking("convnet"))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    gradient = {f"backbone.gradient_weights.{name}" for name in model.config.theta2}
    assert changed == {"activation_weight", "activation_bias", *gradient}


def test_gradient_branch_may_have_a_network_of_its_own(images):
    base, other = trained_looking("convnet"), trained_looking("convnet")
    model = build(base, gradient_base=other)
    random_weights(model)
    alone = build(other)
    set_weights(alone, weights(model))
    outputs = model.backbone(images)
    assert torch.equal(outputs.tangent, alone.backbone(images).tangent)
    assert torch.allclose(outputs.pooler_output, build(base).backbone(images).pooler_output, rtol=0, atol=1e-14)


def test_training_mode_of_a_base_is_refused(images):
    model = build(trained_looking("vit"))
    model.train()
    model(images)  # the model's own training mode leaves the base in evaluation mode
    model.backbone.base.train()
    with pytest.raises(ValueError, match="training mode"):
        model(images)
    separate = build(trained_looking("convnet"), gradient_base=trained_looking("convnet"))
    separate.backbone.base.train()
    with pytest.raises(ValueError, match="training mode"):
        separate(images)


def test_copies_and_leaves_the_base_alone(images):
    base = trained_looking("hfkd_resnet")
    before = copy.deepcopy(base.state_dict())
    build(base, 2)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_functional_call_reaches_the_folded_base(images):
    """`features_at` with theta2 as it is gives f."""
    model = build(trained_looking("resnet"), 2)
    theta2 = model.backbone.theta2()
    assert torch.equal(model.backbone.features_at(theta2, images), model.backbone.features(images))
    logits = functional_call(model.backbone.base, {}, kwargs={"pixel_values": images}).logits
    assert torch.equal(logits, model.backbone.features(images))
