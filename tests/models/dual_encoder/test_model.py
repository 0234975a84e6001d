"""The dual encoder: its scores and loss against loops, its files, the towers it takes over from a teacher."""

import copy
import json
import math

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from lavis_dcd.common.errors import UserError
from lavis_dcd.models.batch import Batch, encode_batch
from lavis_dcd.models.dual_encoder import DualEncoder
from lavis_dcd.models.meter import MeterRetrieval

WORDS = ["red", "blue", "green", "small", "large", "ring"]
VISION = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2}
TEXT = {
    "family": "bert",
    "name": "asset:quickstart/vocab.txt",
    "config": {"vocab_size": 200, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
               "intermediate_size": 16, "max_position_embeddings": 40},
}  # fmt: skip
HEAD = {"dim": 5, "hidden": 7, "dropout": 0.0, "hidden_dropout": 0.0, "token_dropout": 0.0}


def section(**changes) -> dict:
    parts = {"vision": dict(VISION), "text": dict(TEXT), "head": dict(HEAD)}
    for name, value in changes.items():
        parts[name] = {**parts[name], **value} if name in parts else value
    return copy.deepcopy(parts)


def tiny(seed: int = 0, **changes) -> DualEncoder:
    torch.manual_seed(seed)
    return DualEncoder.from_config(section(**changes))


def meter(**changes) -> MeterRetrieval:
    torch.manual_seed(9)
    parts = section(**changes)
    parts.pop("head")
    return MeterRetrieval.from_config({**parts, "fusion": {"width": 8, "layers": 1, "heads": 2}})


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def captions(count: int) -> list[str]:
    return [" ".join(["a", *(WORDS[(i + k) % 6] for k in range(1 + i % 4))]) for i in range(count)]


def batch(ids: list[int]) -> dict:
    return {"image": pictures(max(ids) + 1)[ids], "text_input": captions(len(ids)), "image_id": torch.tensor(ids)}


# -- scores ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("memory_mb", [1024.0, 0.0001])
def test_match_is_the_scaled_cosine_of_each_pair(memory_mb):
    model = tiny(match_memory_mb=memory_mb).eval()
    images, texts = model.encode_images(pictures(4)), model.encode_texts(captions(5))
    pairs = torch.tensor([[3, 4], [0, 0], [3, 1], [3, 4]])
    scores = model.match(images, texts, pairs)
    for (image, text), score in zip(pairs.tolist(), scores, strict=True):
        a = model.embed_images(images[[image]])[0].tolist()
        b = model.embed_texts(texts[[text]])[0].tolist()
        assert sum(x * x for x in a) == pytest.approx(1.0, abs=1e-5)
        assert float(score) == pytest.approx(20 * sum(x * y for x, y in zip(a, b, strict=True)), abs=1e-4)


@torch.no_grad()
def test_match_all_is_match_of_every_pair_and_the_product_of_embeddings():
    model = tiny().eval()
    images, texts = model.encode_images(pictures(3)), model.encode_texts(captions(4))
    table = model.match_all(images, texts)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    torch.testing.assert_close(table, model.match(images, texts, pairs).view(3, 4))
    joint = model.joint_scores(model.embed_images(images), model.embed_texts(texts))
    torch.testing.assert_close(table, model.scale * joint)


@torch.no_grad()
def test_scores_of_half_precision_embeddings_are_not_rounded():
    model = tiny().eval()
    images, texts = model.encode_images(pictures(3)), model.encode_texts(captions(4))
    with torch.autocast("cpu", torch.bfloat16):
        table = model.match_all(images, texts)
        pairs = model.match(images, texts, torch.cartesian_prod(torch.arange(3), torch.arange(4)))
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.flatten(), pairs)


@torch.no_grad()
def test_no_pairs_give_no_scores():
    model = tiny().eval()
    images, texts = model.encode_images(pictures(2)), model.encode_texts(captions(2))
    assert model.match(images, texts, torch.zeros(0, 2, dtype=torch.long)).shape == (0,)


@torch.no_grad()
def test_the_scale_stops_at_one_hundred():
    model = tiny(head={"temperature": 0.001}).eval()
    assert float(model.scale) == pytest.approx(100.0)


@torch.no_grad()
def test_a_longer_companion_in_the_batch_changes_no_embedding():
    model = tiny(head={"text_pooling": "attention_mean"}).eval()
    alone = model.embed_texts(model.encode_texts(["a red ring"]))
    together = model.embed_texts(model.encode_texts(["a red ring", "a small red ring and a large blue green ring"]))
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_own_loss_is_infonce_over_all_pairs_but_captions_of_the_same_picture(smoothing):
    model = tiny(loss={"label_smoothing": smoothing}).eval()
    samples = batch([0, 1, 1, 2, 0])
    losses = model(samples)
    with torch.no_grad():
        features = encode_batch(model, Batch.of(samples))
        table = model.match_all(features.images, features.texts).double()
    owners = [0, 1, 1, 2, 0]

    def row_loss(row: list[float], wanted: int, others: list[int]) -> float:
        counted = [k for k in range(len(row)) if k == wanted or k not in others]
        total = math.log(sum(math.exp(row[k]) for k in counted))
        even = sum(total - row[k] for k in counted) / len(counted)
        return (1 - smoothing) * (total - row[wanted]) + smoothing * even

    expected = 0.0
    for sample, owner in enumerate(owners):
        same = [k for k, other in enumerate(owners) if other == owner]
        expected += row_loss(table[owner].tolist(), sample, same) / 10
        expected += row_loss(table[:, sample].tolist(), owner, [owner]) / 10
    assert float(losses["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert set(losses) == {"loss", "contrastive_loss"}
    torch.testing.assert_close(model.own_loss(samples), losses["loss"])


@pytest.mark.parametrize("ids", [[0], [0, 0, 0], [0, 1]])
def test_small_batches_give_finite_gradients(ids):
    model = tiny(loss={"label_smoothing": 0.1})
    model(batch(ids))["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_gradients_reach_heads_and_not_frozen_towers():
    model = tiny(vision={"freeze": True}, text={"freeze": True}, head={"image_pooling": "attention"}).train()
    assert not model.vision_tower.training and not model.text_tower.training and model.image_head.training
    model(batch([0, 1, 2]))["loss"].backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {n for n, p in model.named_parameters() if p.requires_grad} == model.head_parameter_names()
    assert model.encoders_frozen() and not model.find_unused_parameters and model.fusion_parameters() == 0


def test_every_parameter_of_learning_towers_has_a_gradient():
    model = tiny(head={"image_pooling": "cls", "text_pooling": "mean_max"})
    model(batch([0, 1, 2]))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_few_steps_learn_a_batch():
    model = tiny(vision={"freeze": True}, text={"freeze": True}, head={"dim": 16, "hidden": 64})
    samples = batch([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    first = float(model(samples)["loss"].detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(samples)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 4


# -- files -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_file_rebuilds_the_model_it_came_from(tmp_path):
    saved = tiny(head={"dim": 6, "text_pooling": "attention_mean"}, vision={"freeze": True}).eval()
    path = tmp_path / "student.pth"
    torch.save(saved.checkpoint(), path)
    loaded = tiny(seed=1)
    loaded.load_checkpoint(str(path))
    named = DualEncoder.from_config(section(finetuned=str(path))).eval()
    images, texts = saved.encode_images(pictures(3)), saved.encode_texts(captions(3))
    for model in (loaded.eval(), named):
        assert model.config.head.dim == 6 and not model.config.vision.freeze
        others = model.encode_images(pictures(3)), model.encode_texts(captions(3))
        assert torch.equal(model.match_all(*others), saved.match_all(images, texts))


@torch.no_grad()
def test_a_file_at_another_image_size_has_its_positions_interpolated(tmp_path):
    path = tmp_path / "student.pth"
    torch.save(tiny().checkpoint(), path)
    larger = tiny(vision={"image_size": 16}, finetuned=str(path))
    assert larger.encode_images(torch.zeros(1, 3, 16, 16)).tokens.shape == (1, 17, 8)


def test_another_models_file_is_refused(tmp_path):
    path = tmp_path / "meter.pth"
    torch.save(meter().checkpoint(), path)
    with pytest.raises(UserError, match=r"meter\.pth: holds a meter_retrieval, this model is a dual_encoder"):
        tiny().load_checkpoint(str(path))


def test_a_file_that_leaves_a_weight_at_random_is_refused(tmp_path):
    content = tiny().checkpoint()
    del content["model"]["text_head.projection.2.weight"]
    torch.save(content, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth: lacks 1 of the .* text_head\.projection\.2\.weight"):
        tiny().load_checkpoint(str(tmp_path / "part.pth"))


def test_lavis_builds_the_tiny_type_by_name_offline(offline):
    from lavis.common.registry import registry

    model = registry.get_model_class("dual_encoder").from_pretrained("tiny").eval()
    scores = model.match_all(model.encode_images(torch.zeros(2, 3, 64, 64)), model.encode_texts(["a ring", "a ball"]))
    assert scores.shape == (2, 2) and model.has_joint_space and model.family == "dual"


# -- towers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, config",
    [
        ("distilbert", {"dim": 12, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}),
        ("mpnet", {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}),
        ("electra", {"embedding_size": 8, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "intermediate_size": 16}),
    ],
)  # fmt: skip
def test_any_encoder_of_transformers_is_a_text_tower(kind, config, tmp_path):
    sizes = {"vocab_size": 200, "max_position_embeddings": 48, "pad_token_id": 0, **config}
    text = {**TEXT, "family": kind, "config": sizes}
    torch.manual_seed(0)
    named = DualEncoder.from_config({**section(), "text": text}).eval()
    auto = {**text, "family": "auto", "config": {**sizes, "model_type": kind}}
    torch.manual_seed(0)
    by_type = DualEncoder.from_config({**section(), "text": auto}).eval()
    features = named.encode_texts(captions(3))
    assert features.tokens.shape[2] == 12
    assert torch.equal(by_type.encode_texts(captions(3)).tokens, features.tokens)
    assert not any("pooler" in name for name in named.state_dict())
    # and from a folder, as the hub would give it
    named.text_tower.model.save_pretrained(tmp_path)
    named.text_tower.tokenizer.save_pretrained(tmp_path)
    read = DualEncoder.from_config({**section(), "text": {"family": "auto", "name": str(tmp_path),
                                                          "load_weights": True}}).eval()  # fmt: skip
    torch.testing.assert_close(read.encode_texts(captions(3)).tokens, features.tokens)


@torch.no_grad()
@pytest.mark.parametrize("name, tokens, width", [("resnet18", 4, 512), ("deit_tiny_distilled_patch16_224", 2, 192)])
def test_a_timm_backbone_is_a_vision_tower(name, tokens, width):
    model = tiny(vision={"backbone": f"timm:{name}", "image_size": 224, "grid": 2}).eval()
    assert model.encode_images(torch.zeros(1, 3, 224, 224)).tokens.shape == (1, tokens, width)


def test_clip_weights_in_transformers_names_fill_the_vision_tower(tmp_path):
    torch.manual_seed(3)
    sizes = CLIPVisionConfig(hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                             image_size=8, patch_size=4)  # fmt: skip
    clip = CLIPVisionModel(sizes).eval()
    torch.save({**clip.state_dict(), "logit_scale": torch.tensor(1.0)}, tmp_path / "clip.bin")
    model = tiny(vision={"layers": 2, "weights": str(tmp_path / "clip.bin")}).eval()
    with torch.no_grad():
        expected = clip(pictures(2)).last_hidden_state
        found = model.encode_images(pictures(2)).tokens
    torch.testing.assert_close(found, clip.vision_model.post_layernorm(expected))
    with pytest.raises(UserError, match=r"clip\.bin lacks 16 of the tower's"):
        tiny(vision={"layers": 3, "weights": str(tmp_path / "clip.bin")})


def test_towers_are_shared_with_a_meter_teacher():
    teacher, student = meter().eval(), tiny()
    teacher.requires_grad_(False)
    student.adopt_towers(teacher, share=True)
    assert student.shares_encoders_with(teacher) and student.encoders_frozen()
    student.train()
    assert not teacher.vision_tower.training and not teacher.text_tower.training
    student(batch([0, 1]))["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_towers_are_copied_and_learn_on_their_own(tmp_path):
    teacher, student = meter(text={"max_length": 12}).eval(), tiny()
    teacher.requires_grad_(False)
    student.init_from_teacher(teacher, share_encoders=False)
    assert not student.encoders_frozen() and student.config.text.max_length == 12
    assert torch.equal(student.encode_images(pictures(2)).tokens, teacher.encode_images(pictures(2)).tokens)
    with torch.no_grad():
        next(student.vision_tower.parameters()).add_(1.0)
    assert not torch.equal(student.encode_images(pictures(2)).tokens, teacher.encode_images(pictures(2)).tokens)
    # its file says what it is now
    torch.save(student.checkpoint(), tmp_path / "student.pth")
    again = DualEncoder.from_config({"finetuned": str(tmp_path / "student.pth")})
    assert torch.equal(again.encode_images(pictures(2)).tokens, student.encode_images(pictures(2)).tokens)


@pytest.mark.parametrize("share, freeze, learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_adopted_towers_learn_only_as_copies_that_are_not_frozen(share, freeze, learns):
    student = tiny(vision={"freeze": freeze}, text={"freeze": freeze})
    student.adopt_towers(meter(vision={"freeze": True}), share)
    assert {p.requires_grad for tower in student.encoder_modules() for p in tower.parameters()} == {learns}
    assert student.config.vision.freeze is not learns


def test_teachers_whose_towers_cannot_be_taken_over_are_named():
    with pytest.raises(UserError, match=r"Linear has no towers .* with weights"):
        tiny().adopt_towers(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"model\.student\.vision: 8 channels, the teacher's tower has 16; leave"):
        tiny().adopt_towers(meter(vision={"width": 16}))
    with pytest.raises(UserError, match=r"init_from_teacher\.layers: a dual_encoder has no fusion"):
        tiny().init_from_teacher(meter(), layers=[0])


# -- whether features can be shared ------------------------------------------------------------------------------


def same_towers(model, other) -> None:
    for part in ("vision_tower", "text_tower"):
        getattr(other, part).load_state_dict(getattr(model, part).state_dict())


def frozen(model):
    return model.requires_grad_(False)


def test_equal_frozen_towers_of_meter_and_dual_encoder_share_features():
    teacher, student = frozen(meter()), frozen(tiny())
    assert not student.shares_encoders_with(teacher)
    same_towers(teacher, student)
    assert student.encoder_signature() == teacher.encoder_signature()
    assert student.shares_encoders_with(teacher) and teacher.shares_encoders_with(student)
    student.requires_grad_(True)
    assert not student.shares_encoders_with(teacher)


def test_the_same_encoder_built_by_family_auto_has_the_same_signature():
    one, other = tiny(), tiny(text={"family": "auto", "config": {**TEXT["config"], "model_type": "bert"}})
    same_towers(one, other)
    assert one.encoder_signature() == other.encoder_signature()


@pytest.mark.parametrize(
    "changes",
    [{"text": {"max_length": 12}}, {"vision": {"heads": 1}},
     {"text": {"config": {**TEXT["config"], "layer_norm_eps": 1e-3}}}],
)  # fmt: skip
def test_settings_that_shape_tokens_change_the_signature(changes):
    one, other = tiny(), tiny(**changes)
    same_towers(one, other)
    assert one.encoder_signature() != other.encoder_signature()


def test_the_grid_of_a_map_changes_the_signature():
    towers = [tiny(vision={"backbone": "timm:resnet18", "image_size": 64, "grid": grid}) for grid in (1, 1, 2)]
    for other in towers[1:]:
        same_towers(towers[0], other)
    one, equal, different = (model.encoder_signature() for model in towers)
    assert one == equal != different


def test_the_vocabulary_changes_the_signature(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "one.txt").write_text("\n".join(words))
    (tmp_path / "same.txt").write_text("\n".join(words))
    (tmp_path / "other.txt").write_text("\n".join([*words[:-2], *words[:-3:-1]]))
    signatures = []
    for name in ("one", "same", "other"):
        model = tiny(text={"name": str(tmp_path / f"{name}.txt")})
        model.encode_texts(["red", "red blue"])  # calls leave settings of their own in a tokenizer
        signatures.append(model.encoder_signature())
    assert signatures[0] == signatures[1] != signatures[2]


def test_the_signature_follows_a_change_of_the_weights():
    model = frozen(tiny())
    before = model.encoder_signature()
    assert model.encoder_signature() == before
    with torch.no_grad():
        next(model.text_tower.parameters()).mul_(1.5)
    assert model.encoder_signature() != before
    assert frozen(copy.deepcopy(model)).encoder_signature() == model.encoder_signature()


def test_without_a_tokenizer_the_signature_is_unknown(offline):
    model = tiny(text={"name": "/no/such/folder"})
    assert model.encoder_signature() is None and not frozen(model).shares_encoders_with(frozen(tiny()))


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head": {"image_pooling": "median"}}, r"model\.head\.image_pooling: 'median' is not one of .*mean_max"),
        ({"head": {"dim": 0, "token_dropout": 1.0}},
         r"model\.head: dim is 0, at least 1 is needed; token_dropout is 1\.0, not in \[0, 1\)"),
        ({"head": {"temperature": 0.0}}, r"model\.head: temperature is 0\.0, it must be above 0"),
        ({"loss": {"label_smoothing": 1.0}}, r"model\.loss: label_smoothing is 1\.0"),
        ({"text": {"max_length": 2}}, r"model\.text\.max_length: 2 cuts every caption to nothing .* at least 3"),
        ({"text": {"family": "berta"}}, r"model\.text\.family: 'berta' is neither auto"),
        ({"text": {"family": "auto"}}, r"model\.text\.config\.model_type: None; with family: auto"),
        ({"text": {"family": "t5", "config": {"vocab_size": 200}}}, r"model\.text: a t5 is no plain text encoder"),
        ({"vision": {"backbone": "timm:resnet1"}}, r"model\.vision\.backbone: timm has no 'resnet1'"),
        ({"vision": {"backbone": "timm:deit_tiny_patch16_224", "image_size": 32}},
         r"model\.vision\.image_size: timm's deit_tiny_patch16_224 does not take pictures of 32 pixels"),
        ({"vision": {"backbone": "timm:resnet18", "image_size": 64}, "head": {"image_pooling": "cls"}},
         r"model\.head\.image_pooling: cls, but the 4 tokens of timm:resnet18 are a map"),
        ({"vision": {"weights": "/no/such/file"}}, r"/no/such/file: no such file"),
        ({"fusion": {"layers": 2}}, r"model\.fusion: unknown key"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_field(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


def test_a_family_that_is_not_the_folders_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    with pytest.raises(UserError, match=r"model\.text\.family: bert, but .* holds a mpnet; say auto"):
        tiny(text={"name": str(tmp_path), "config": {}})


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    tokenizer = tiny().text_tower.tokenizer
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        kept = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**kept, "pad_token": None}))
    with pytest.raises(UserError, match=r"has no padding token"):
        tiny(text={"name": str(tmp_path)}).encode_texts(["a ring"])
