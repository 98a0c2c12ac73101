"""AFD end to end on tiny nets: gradient masks, the cycle, update order, and identities between settings."""

import copy
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from tiny_runs import NO_AUGMENTATION, tiny_resnet
from torch.nn import functional as F

from hfkd.data import Preprocessing, ResidentImages
from hfkd.errors import InputError
from hfkd.losses.online_adversarial import discriminator_loss, distillation_kl, generator_loss
from hfkd.models import HfkdWideResNetConfig, HfkdWideResNetForImageClassification
from hfkd.trainers.networks import Renormalize
from hfkd.trainers.online_adversarial import OnlineAdversarialConfig
from hfkd.trainers.optimizers import milestone_schedule


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def wide_resnet(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = HfkdWideResNetConfig(depth=10, width_factor=1, num_channels=1, image_size=8, num_labels=10)
        return HfkdWideResNetForImageClassification(config)


def mixed_students():
    return [tiny_resnet(0), tiny_resnet(1, depths=(1, 2)), wide_resnet(2)]


def one_batch(trainer, count=16):
    trainer.create_optimizer()
    source = trainer.train_dataset
    assert isinstance(source, ResidentImages)
    keys = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], dim=1)
    return trainer._materialise(source, {"key": keys})


def reaches(loss, module):
    parameters = list(module.parameters())
    if not parameters:  # an identity transfer layer
        return False
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and g.abs().sum() > 0 for g in found)


def reaches_all(loss, parameters):
    return all(
        g is not None and g.abs().sum() > 0
        for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    )


# -- gradient masks --------------------------------------------------------------------------------


def test_each_loss_reaches_its_own_networks_only(make_trainer):
    trainer = make_trainer(mixed_students())
    batch = one_batch(trainer)
    trainer.model.train()
    features = trainer.features(batch["pixel_values"])
    maps = trainer._maps(features)
    students, transfer = trainer.model.students, trainer.model.training_only["transfer"]
    discriminators = trainer.model.training_only["discriminators"]

    for k, loss in enumerate(trainer.maps.discriminator_losses(maps)[0]):
        assert reaches_all(loss, list(discriminators[k].parameters()))
        assert not any(reaches(loss, discriminators[j]) for j in range(3) if j != k)
        assert not any(reaches(loss, students[j]) or reaches(loss, transfer[j]) for j in range(3))
    for k, loss in enumerate(trainer.maps.extractor_losses(maps)):
        # Every parameter of G_k, batch norm's included, and nothing of C_k.
        assert reaches_all(loss, trainer.adapters[k].backbone_parameters() + list(transfer[k].parameters()))
        assert not reaches(loss, trainer.adapters[k].head)
        assert not any(reaches(loss, students[j]) or reaches(loss, transfer[j]) for j in range(3) if j != k)
    for k, loss in enumerate(trainer._logit_losses(features, batch["labels"])[0]):
        assert reaches_all(loss, list(students[k].parameters()))
        assert not any(reaches(loss, students[j]) for j in range(3) if j != k)
        assert not any(reaches(loss, transfer[j]) or reaches(loss, discriminators[j]) for j in range(3))


def test_transfer_layers_bring_unequal_maps_to_one_shape(make_trainer):
    trainer = make_trainer(mixed_students())
    maps = trainer._maps(trainer.features(one_batch(trainer)["pixel_values"]))
    assert len({f.shape for f in maps}) == 1
    assert [len(list(layer.parameters())) > 0 for layer in trainer.maps.transfer] == [False, False, True]


def test_extractor_step_leaves_the_discriminators_alone(make_trainer):
    trainer = make_trainer(discriminator_learning_rate=0.0, feature_weight_decay=0.0, max_steps=2)
    before = weights(trainer.model.training_only["discriminators"])
    trainer.train()
    assert_equal(before, weights(trainer.model.training_only["discriminators"]))


# -- the cycle -------------------------------------------------------------------------------------


def test_generic_cycle_equals_a_hand_written_pair(make_trainer):
    students = [tiny_resnet(s, dtype=torch.float64) for s in (0, 1)]
    trainer = make_trainer(
        copy.deepcopy(students), max_steps=3, augmentation=NO_AUGMENTATION, feature_learning_rate=1e-3
    )
    trainer.model.training_only.double()
    d1, d2 = (copy.deepcopy(d) for d in trainer.model.training_only["discriminators"])
    batches = []
    step = trainer.method_step
    trainer.method_step = lambda batch, share, last: (batches.append(batch), step(batch, share, last))[1]
    trainer.train()

    net1, net2 = (s.train() for s in students)
    both = [*net1.parameters(), *net2.parameters()]
    backbones = [*net1.base_model.parameters(), *net2.base_model.parameters()]
    sgd = torch.optim.SGD(both, lr=0.05, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(backbones, lr=1e-3, weight_decay=0.1)
    adam_d = torch.optim.Adam([*d1.parameters(), *d2.parameters()], lr=1e-3, weight_decay=0.1)
    # Of three steps, SGD's milestones .5 and .75 fall on the third, Adam's .25 and .5 on the second and third.
    for batch, (main, maps) in zip(batches, [(1, 1), (1, 0.1), (0.01, 0.01)], strict=True):
        sgd.param_groups[0]["lr"], adam.param_groups[0]["lr"] = 0.05 * main, 1e-3 * maps
        adam_d.param_groups[0]["lr"] = 1e-3 * maps
        x, y = batch["pixel_values"], batch["labels"]
        f1 = net1.base_model(x).last_hidden_state
        f2 = net2.base_model(x).last_hidden_state
        z1, z2 = (net.classifier(f.mean((2, 3))) for net, f in ((net1, f1), (net2, f2)))
        logit = F.cross_entropy(z1, y) + distillation_kl(z1, z2) + F.cross_entropy(z2, y) + distillation_kl(z2, z1)
        g_logit = torch.autograd.grad(logit, both, retain_graph=True)
        loss_d = discriminator_loss(d1(f2.detach()), d1(f1.detach())) + discriminator_loss(
            d2(f1.detach()), d2(f2.detach())
        )
        adam_d.zero_grad()
        loss_d.backward()
        adam_d.step()
        g_map = torch.autograd.grad(generator_loss(d1(f1)) + generator_loss(d2(f2)), backbones)
        for optimizer, parameters, values in ((sgd, both, g_logit), (adam, backbones, g_map)):
            for parameter in both:
                parameter.grad = None
            for parameter, value in zip(parameters, values, strict=True):
                parameter.grad = value
            optimizer.step()
    assert_equal(weights(trainer.model.students[0]), weights(net1), atol=1e-12)
    assert_equal(weights(trainer.model.students[1]), weights(net2), atol=1e-12)
    assert_equal(weights(trainer.model.training_only["discriminators"][0]), weights(d1), atol=1e-12)


def losses_of(trainer, batch):
    trainer.model.train()
    features = trainer.features(batch["pixel_values"])
    logit = trainer._logit_losses(features, batch["labels"])[0]
    maps = trainer._maps(features)
    return logit, trainer.maps.discriminator_losses(maps)[0], trainer.maps.extractor_losses(maps)


def test_knowledge_flows_one_way_around_the_cycle(make_trainer):
    students = [tiny_resnet(s, dtype=torch.float64) for s in range(3)]
    trainer = make_trainer(students)
    trainer.model.training_only.double()
    batch = one_batch(trainer)
    before = [[x.item() for x in group] for group in losses_of(trainer, batch)]
    with torch.no_grad():
        for parameter in trainer.model.students[0].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = [[x.item() for x in group] for group in losses_of(trainer, batch)]
    for (b0, b1, b2), (a0, a1, a2) in zip(before[:2], after[:2], strict=True):
        assert a0 != b0 and a1 != b1  # network 0 itself, and network 1, which learns from it
        assert a2 == b2
    assert after[2][1:] == before[2][1:]  # L_G^k depends on network k alone


def test_relabelling_the_cycle_permutes_the_losses(make_trainer, tmp_path):
    students = [tiny_resnet(s, dtype=torch.float64) for s in range(3)]
    trainer = make_trainer(students, output_dir=str(tmp_path))
    trainer.model.training_only.double()
    batch = one_batch(trainer)
    before = losses_of(trainer, batch)
    order = [1, 2, 0]
    trainer.adapters = [trainer.adapters[i] for i in order]
    trainer.maps.discriminators = torch.nn.ModuleList([trainer.maps.discriminators[i] for i in order])
    after = losses_of(trainer, batch)
    for group, moved in zip(before, after, strict=True):
        for new, old in enumerate(order):
            assert moved[new].item() == pytest.approx(group[old].item(), abs=1e-12)


# -- identities between settings -------------------------------------------------------------------


def trained(make_trainer, tmp_path, name, students=2, dtype=torch.float32, **config):
    nets = [tiny_resnet(s, dtype=dtype) for s in range(students)]
    trainer = make_trainer(nets, output_dir=tmp_path / name, **config)
    if dtype == torch.float64:
        trainer.model.training_only.double()
    trainer.train()
    return weights(trainer.model.students)


def test_without_adam_steps_the_trajectory_is_logit_only(make_trainer, tmp_path):
    logit_only = trained(make_trainer, tmp_path, "a", feature_loss="none", max_steps=4)
    silent = trained(make_trainer, tmp_path, "b", feature_learning_rate=0.0, feature_weight_decay=0.0, max_steps=4)
    assert_equal(logit_only, silent)


def test_logit_only_pair_is_deep_mutual_learning(make_trainer, tmp_path):
    """DML: L_k = CE_k + mean over the others of T^2 KL(p_j || p_k); with two networks that is the cycle."""
    cycle = trained(make_trainer, tmp_path, "a", feature_loss="none", max_steps=4)
    everyone = trained(make_trainer, tmp_path, "b", feature_loss="none", logit_source="all", max_steps=4)
    assert_equal(cycle, everyone)
    three = [
        trained(make_trainer, tmp_path, name, 3, feature_loss="none", logit_source=name) for name in ("all", "cycle")
    ]
    assert any(not torch.equal(three[0][key], three[1][key]) for key in three[0])


def test_vanilla_arm_trains_each_student_alone(make_trainer, tmp_path):
    vanilla = {"feature_loss": "none", "kl_weight": 0.0, "max_steps": 4}
    pair = trained(make_trainer, tmp_path, "a", **vanilla)
    trio = trained(make_trainer, tmp_path, "b", 3, **vanilla)
    assert_equal(pair, {key: value for key, value in trio.items() if not key.startswith("2.")})


def test_shrink_only_control_is_adam_on_zero_gradients(make_trainer, tmp_path):
    vanilla = trained(make_trainer, tmp_path, "a", feature_loss="none", max_steps=1)
    shrunk = trained(make_trainer, tmp_path, "b", feature_loss_weight=0.0, max_steps=1, feature_lr_milestones=[])
    changed = 0
    for key, value in vanilla.items():
        if "classifier" in key or "running" in key or "tracked" in key:
            assert torch.equal(value, shrunk[key])
            continue
        # Coupled decay, normalised: every weight takes the same step of 2e-5 towards zero.
        nonzero = value.abs() > 1e-3
        step = (value - shrunk[key])[nonzero] * value[nonzero].sign()
        torch.testing.assert_close(step, torch.full_like(step, 2e-5), rtol=0.05, atol=2e-7)
        changed += int(nonzero.sum())
    assert changed > 100


def test_coupled_and_decoupled_decay():
    moves = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
        theta.grad = torch.tensor([1e-3, 1e-3, -0.1], dtype=torch.float64)
        kind([theta], lr=2e-5, weight_decay=0.1).step()
        moves[kind] = theta.detach() - torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = {torch.optim.Adam: (-2e-5, 2e-5, 2e-5), torch.optim.AdamW: (-2.2e-5, -1.6e-5, 1.9e-5)}
    for kind, values in expected.items():
        torch.testing.assert_close(moves[kind], torch.tensor(values, dtype=torch.float64), rtol=0, atol=2e-8)


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_feature_optimizer_setting(make_trainer, name, kind):
    trainer = make_trainer(feature_optimizer=name)
    optimizers = trainer.build_optimizers()
    assert type(optimizers["feature"]) is kind and type(optimizers["discriminator"]) is kind
    assert optimizers["feature"].param_groups[0]["weight_decay"] == 0.1
    assert optimizers["student"].param_groups[0]["weight_decay"] == 1e-4
    assert len(optimizers["student"].param_groups[0]["params"]) == len(list(trainer.model.students.parameters()))


def test_paper_schedule():
    """Learning rates of 300 epochs at the epochs around each drop."""
    config = OnlineAdversarialConfig("unused", use_cpu=True)
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.max_grad_norm) == (300, 128, 0)
    per_epoch = 391

    def rates(rate, milestones):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=rate)
        schedule = milestone_schedule(optimizer, max_steps=300 * per_epoch, milestones=milestones, gamma=0.1)
        return [schedule.lr_lambdas[0](e * per_epoch) * rate for e in (0, 74, 75, 149, 150, 224, 225, 299)]

    sgd = rates(config.learning_rate, config.lr_milestones)
    assert sgd == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    adam = rates(config.feature_learning_rate, config.feature_lr_milestones)
    assert adam == pytest.approx([2e-5, 2e-5, 2e-6, 2e-6, 2e-7, 2e-7, 2e-7, 2e-7])


# -- one update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["single_forward", "recompute"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_running_statistics_are_updated_once_per_image(make_trainer, mode, accumulation):
    trainer = make_trainer(
        max_steps=3,
        update_mode=mode,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=50 // accumulation,
    )
    trainer.train()
    tracked = {v.item() for k, v in trainer.model.students.state_dict().items() if k.endswith("num_batches_tracked")}
    assert tracked == {3 * accumulation}


def test_both_update_modes_take_the_same_first_sgd_step(make_trainer, tmp_path):
    settings = {"max_steps": 1, "feature_learning_rate": 0.0, "feature_weight_decay": 0.0}
    single = trained(make_trainer, tmp_path, "a", update_mode="single_forward", **settings)
    recompute = trained(make_trainer, tmp_path, "b", update_mode="recompute", **settings)
    assert_equal(single, recompute)


def test_sgd_momentum_is_not_touched_by_adam(make_trainer, tmp_path):
    def momentum(name, **config):
        trainer = make_trainer(output_dir=tmp_path / name, max_steps=1, **config)
        trainer.train()
        state = trainer.optimizer.optimizers["student"].state_dict()["state"]
        return [entry["momentum_buffer"] for entry in state.values()]

    for a, b in zip(momentum("a", feature_loss="none"), momentum("b", feature_learning_rate=1e-2), strict=True):
        assert torch.equal(a, b)


def test_updates_survive_anomaly_mode(make_trainer):
    with torch.autograd.set_detect_anomaly(True):
        make_trainer(max_steps=3, discriminator_batch="joint", update_order="generator_first").train()


@pytest.mark.parametrize(
    "setting", ["adversarial", "l1", "l2", "main", "joint", "linear", "offline", "cycle of three"]
)
def test_every_arm_descends(make_trainer, setting):
    config, teacher = {"learning_rate": 0.1, "lr_milestones": []}, None
    students = [tiny_resnet(s, width=16) for s in (0, 1)]
    if setting in ("l1", "l2"):
        config["feature_loss"] = setting
    elif setting == "main":
        config |= {"feature_loss": "l1", "feature_optimizer": "main", "transfer_always": True}
    elif setting == "joint":
        config |= {"discriminator_batch": "joint", "gan_loss": "hinge"}
    elif setting == "linear":
        config |= {"gan_loss": "lsgan_linear", "discriminator_norm": "none", "discriminator_patch": True}
    elif setting == "offline":
        students, teacher = students[:1], tiny_resnet(9, width=8)
    elif setting == "cycle of three":
        students = [*students, wide_resnet(2)]
    frozen = weights(teacher) if teacher else None
    trainer = make_trainer(students, teacher=teacher, max_steps=20, augmentation=NO_AUGMENTATION, **config)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "student_0_ce" in entry]
    first, last = history[:3], history[-3:]
    assert sum(e["student_0_ce"] for e in last) < 0.8 * sum(e["student_0_ce"] for e in first)
    if teacher:
        assert_equal(frozen, weights(teacher))
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())


# -- accumulation, workers -------------------------------------------------------------------------


@pytest.mark.parametrize("feature_loss", ["adversarial", "l2", "none"])
def test_accumulated_micro_batches_equal_one_batch(make_trainer, tmp_path, feature_loss):
    """32x1 = 16x2 = 8x4, float64, norm-free; 200 images make the last update ragged."""

    def run(name, size, steps):
        nets = [tiny_resnet(s, norm="group", dtype=torch.float64) for s in range(2)]
        trainer = make_trainer(
            nets,
            output_dir=tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=9,
            feature_loss=feature_loss,
            **({} if feature_loss == "none" else {"feature_learning_rate": 1e-3}),
            **({"discriminator_norm": "none"} if feature_loss == "adversarial" else {}),
        )
        trainer.model.training_only.double()
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return weights(trainer.model), log

    whole, log = run("32x1", 32, 1)
    for size, steps in ((16, 2), (8, 4)):
        parts, parts_log = run(f"{size}x{steps}", size, steps)
        assert_equal(whole, parts, atol=1e-11)
        for a, b in zip(log, parts_log, strict=True):
            for name in ("loss", "student_0_ce", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5)
            if feature_loss != "none":
                assert a["student_1_feature"] == pytest.approx(b["student_1_feature"], rel=1e-5)


def test_workers_change_nothing(make_trainer, tmp_path):
    runs = [trained(make_trainer, tmp_path, str(w), dataloader_num_workers=w, max_steps=6) for w in (0, 2)]
    assert_equal(*runs)


# -- bad input -------------------------------------------------------------------------------------


def test_bad_cohorts(make_trainer):
    with pytest.raises(InputError, match="two or more"):
        make_trainer([tiny_resnet(0)])
    with pytest.raises(InputError, match="classes"):
        make_trainer([tiny_resnet(0), tiny_resnet(1, num_labels=7)])


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.0},
        {"kl_weight": -1.0},
        {"feature_loss": "l3"},
        {"gan_loss": "wgan"},
        {"discriminator_layers": 0},
        {"transfer_channels": "wide"},
        {"feature_optimizer": "main"},
        {"feature_lr_milestones": [75.0]},
    ],
)
def test_bad_settings(config):
    with pytest.raises(InputError) as caught:
        OnlineAdversarialConfig("unused", use_cpu=True, **config)
    assert "\n" not in str(caught.value) and next(iter(config)) in str(caught.value)


def test_all_choices_are_accepted():
    for name, hint in get_type_hints(OnlineAdversarialConfig).items():
        for choice in get_args(hint) if get_origin(hint) is Literal else ():
            extra = {"feature_loss": "l1"} if choice == "main" else {}
            assert getattr(OnlineAdversarialConfig("unused", **{name: choice}, **extra), name) == choice


def test_teacher_sees_pixels_in_its_own_statistics(make_trainer):
    """Also where the students' statistics are known from the data alone, without a processor."""
    processor = Preprocessing(8, 1, (0.5,), (0.25,)).to_image_processor()
    trainer = make_trainer([tiny_resnet(0)], teacher=tiny_resnet(1), teacher_processing_class=processor)
    ours = trainer.train_dataset.preprocessing
    raw = torch.rand(2, 1, 8, 8)
    seen = trainer.model.frozen()[0].renormalize((raw - ours.mean[0]) / ours.std[0])
    torch.testing.assert_close(seen, (raw - 0.5) / 0.25)
    assert Renormalize.for_teacher(ours, ours.to_image_processor()) is None
