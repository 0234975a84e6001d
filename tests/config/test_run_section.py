import pytest
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import RunConfig


def test_words_that_yaml_reads_as_booleans():
    run = parse(RunConfig, {"amp": False, "cache_features": False, "verify": False}, "run")
    assert (run.amp, run.cache_features, run.verify) == ("off", "off", "off")


def test_keys_of_lavis_projects_are_accepted():
    keys = {"world_size": 1, "dist_url": "env://", "distributed": True, "use_dist_eval_sampler": False}
    run = parse(RunConfig, {**keys, "lr_sched": "linear_warmup_cosine_lr", "k_test": 256}, "run")
    assert run.k_test == 256


def test_every_fault_is_reported():
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {"max_epoch": 0, "warmup": 5, "betas": [0.9], "min_lr": 1.0, "job_id": "a/b"}, "run")
    assert [line.split(":")[0] for line in caught.value.faults] == [
        "run.max_epoch",
        "run.warmup",
        "run.betas",
        "run.min_lr",
        "run.job_id",
    ]


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean .*init_lr"):
        parse(RunConfig, {"int_lr": 1e-4}, "run")


def test_training_needs_a_split_and_evaluation_does_not():
    with pytest.raises(UserError, match="train_splits"):
        RunConfig(train_splits=[])
    assert RunConfig(train_splits=[], evaluate=True).missing_splits([]) == []


@pytest.mark.parametrize(
    ("keys", "table", "teacher"),
    [
        ({"valid_splits": ["val"], "test_splits": ["test"]}, ["test"], ["test"]),
        ({"valid_splits": ["val"]}, ["val"], ["val"]),
        ({"test_splits": ["test"], "teacher_split_eval": ["val"]}, ["test"], ["val"]),
        ({"test_splits": ["test"], "evaluate_teacher": False}, ["test"], []),
    ],
)
def test_splits_of_the_table(keys, table, teacher):
    run = RunConfig(**keys)
    assert run.table_splits == table and run.teacher_splits == teacher


NAMES = [
    "../../x",
    "..",
    "a/b",
    "a\\b",
    "",
    ".hidden",
    "x" * 201,
    "ä" * 101,
    "a\0b",
    "a\nb",
    "\u202eevil",
    " x",
    7,
    ["x"],
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("field", ["project", "job_id"])
def test_names_of_folders(field, name):
    with pytest.raises(UserError) as caught:
        RunConfig(**{field: name})
    (line,) = caught.value.faults
    assert line.startswith(f"run.{field}: ") and line.isprintable() and len(line) < 400


@pytest.mark.parametrize("path", ["", "a\0b", "a\nb", "x/" + "y" * 256, "d/" * 2000, 7, None], ids=ascii)
def test_paths_of_the_outputs(path):
    with pytest.raises(UserError, match=r"run\.output_dir: "):
        RunConfig(output_dir=path)


def test_usual_places_pass():
    RunConfig(output_dir="../out put/ü", project="flickr 30k_v2.1", job_id="2026-01-01 (b)")


@pytest.mark.parametrize("seed", [2**32, 10**400, -1, 1.5, "seven", True, None], ids=lambda seed: str(seed)[:9])
def test_seeds(seed):
    with pytest.raises(UserError, match=r"run\.seed: "):
        RunConfig(seed=seed)


@pytest.mark.parametrize("value", ["1e400", ".inf", "10000000000000000000000", "1e30", "seven", "[1]", "null", "true"])
def test_seeds_of_a_file(value):
    with pytest.raises(UserError, match=r"run\.seed: "):
        parse(RunConfig, OmegaConf.from_dotlist([f"seed={value}"]), "run")


@pytest.mark.parametrize("name", ["max_epoch", "batch_size_train", "num_workers", "num_threads", "keep_last", "k_test"])
def test_numbers_that_no_counter_takes(name):
    with pytest.raises(UserError, match=rf"run\.{name}: 1000000000000000000000 is more than 2,147,483,647"):
        RunConfig(**{name: 10**21})
