"""Values from the environment: hidden in texts, and stored as they are written."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from lavis_dcd.common import secrets
from lavis_dcd.common.texts import shown

TOKEN = "hunter2-token-of-mine"


@pytest.fixture(autouse=True)
def a_token(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    secrets.forget()
    yield
    secrets.forget()


def remembered(config: dict) -> None:
    secrets.remember(OmegaConf.create(config))


@pytest.mark.parametrize(
    "text",
    ["${oc.env:MY_TOKEN}", "https://host/${oc.env:MY_TOKEN}/x",
     "${ oc.env : MY_TOKEN , other }", "${oc.env:'MY_TOKEN'}",
     "${oc.env:ABSENT,${oc.env:MY_TOKEN}}", "${oc.decode:${oc.env:MY_TOKEN}}"],
)  # fmt: skip
def test_a_variable_hides_its_value(text):
    remembered({"run": {"list": [1, {"deep": text}]}})
    assert secrets.hidden(f"{TOKEN} cannot be read") == "${oc.env:MY_TOKEN} cannot be read"


def test_a_name_that_is_put_together_hides_the_whole_value():
    remembered({"which": "MY_TOKEN", "key": "${oc.env:${which}}"})
    assert TOKEN not in secrets.hidden(f"a {TOKEN} b")


def test_a_plug_ins_resolver_hides_what_it_gives():
    OmegaConf.register_new_resolver("vault_of_test", lambda key: {"password": f"open-{key}", "port": 7})
    try:
        remembered({"a": "${vault_of_test:sesame}"})
    finally:
        OmegaConf.clear_resolver("vault_of_test")
    assert secrets.hidden("it is open-sesame.") == "it is ${vault_of_test:sesame}."


@pytest.mark.parametrize("value", ["C:\\tokens\\one", 'it\'s\nlong "quoted" äö', "a/b?c=d&e"])
def test_a_value_is_hidden_however_a_text_quotes_it(value, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", value)
    remembered({"a": "${oc.env:MY_TOKEN}"})
    for text in (value, repr(value), json.dumps(value), shown([value])):
        assert secrets.hidden(text).strip("[]'\"") == "${oc.env:MY_TOKEN}"


def test_a_long_value_is_hidden_before_it_is_cut(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "0123456789" * 100)
    remembered({"a": "${oc.env:MY_TOKEN}"})
    assert "0123456789" not in shown("0123456789" * 100)


def test_defaults_and_words_of_others_stay(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "photo")
    remembered({"a": "${oc.env:ABSENT,weights}", "b": "${oc.env:MY_TOKEN}", "c": "${a}"})
    assert secrets.hidden("photographs/weights/photo") == "photographs/weights/${oc.env:MY_TOKEN}"
    monkeypatch.setenv("MY_TOKEN", "7")
    secrets.forget()
    remembered({"a": "${oc.env:MY_TOKEN}"})
    assert secrets.hidden("step 7 of 17") == "step 7 of 17"


def test_what_is_stored_has_the_interpolations():
    section = OmegaConf.create({"a": {"b": "${oc.env:MY_TOKEN}/x", "c": [1, "${oc.env:MY_TOKEN}"]}, "n": None, "k": 2})
    resolved = {**OmegaConf.to_container(section, resolve=True), "default": 0.5}
    assert secrets.as_written(resolved, section) == {
        "a": {"b": "${oc.env:MY_TOKEN}/x", "c": [1, "${oc.env:MY_TOKEN}"]}, "n": None, "k": 2, "default": 0.5,
    }  # fmt: skip
    secrets.remember(section)
    assert secrets.as_stored({"path": f"/data/{TOKEN}/x", "list": (TOKEN, 3)}) == {
        "path": "/data/${oc.env:MY_TOKEN}/x", "list": ("${oc.env:MY_TOKEN}", 3),
    }  # fmt: skip


def test_values_that_cannot_be_resolved_are_no_matter():
    remembered(
        {"a": "${oc.env:ABSENT}", "b": "${nobody}", "c": "${a}", "d": "???", "e": None, "f": "${oc.env:MY_TOKEN}"}
    )
    assert secrets.hidden(TOKEN) == "${oc.env:MY_TOKEN}"


@pytest.mark.parametrize(
    "text", ["${oc.decode:${oc.env:MY_TOKEN}}", "${oc.env:MY_TOKEN}${nobody}", "${no_such:${oc.env:MY_TOKEN}}"]
)
def test_a_value_is_hidden_where_its_setting_cannot_be_read(text, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "{hunter2: [")
    remembered({"a": text})
    assert secrets.hidden("cannot parse {hunter2: [") == "cannot parse ${oc.env:MY_TOKEN}"


@pytest.mark.parametrize(
    ("value", "text"), [("/tmp", "in /tmp/x and /tmp"), ("/data/photos/", "below /data/photos: none")]
)
def test_paths_are_hidden_with_and_without_their_slash(value, text, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", value)
    remembered({"a": "${oc.env:MY_TOKEN}"})
    assert value.rstrip("/") not in secrets.hidden(text)


def test_a_dot_is_no_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "././")
    remembered({"a": "${oc.env:MY_TOKEN}"})
    assert secrets.hidden("1.5 at ./x") == "1.5 at ./x"


def test_a_file_of_weights_keeps_the_words_that_its_readers_need(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "roberta")
    remembered({"a": "${oc.env:MY_TOKEN}"})
    config = {"text": {"family": "roberta", "name": "roberta", "config": {"act": "gelu"}}, "more": ["/x/roberta/y"]}
    assert secrets.as_exported(config) == {
        "text": {"family": "roberta", "name": "${oc.env:MY_TOKEN}", "config": {"act": "gelu"}},
        "more": ["/x/${oc.env:MY_TOKEN}/y"],
    }


def test_passwords_and_tokens_in_addresses_are_left_out():
    stored = secrets.as_stored({"finetuned": "https://user:hunter2@server/a.pth?token=hunter2&v=3", "sum": ["a", 1]})
    assert stored == {"finetuned": "https://***@server/a.pth?token=***&v=3", "sum": ["a", 1]}
    assert "hunter2" not in secrets.hidden("fetching https://x:hunter2@server/a.pth now")


def test_a_long_word_is_searched_once():
    """A caption of megabytes passes here; searched again from each of its letters it would take days."""
    assert secrets.hidden("x" * 3_000_000) == "x" * 3_000_000
