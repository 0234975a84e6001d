"""Job files and options that are no job's, or that a few lines blow up."""

from __future__ import annotations

import os

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.config.job_file import parse_options, read_job, read_yaml

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)  # fmt: skip
MERGES = "a0: &a0 {k0: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}\n" for n in range(1, 12)
)  # fmt: skip


def refused(work, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments)
    (line,) = caught.value.faults
    return line


@pytest.mark.parametrize("text", [LAUGHS, MERGES], ids=["aliases", "merges"])
def test_a_billion_laughs(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    line = refused(read_yaml, tmp_path / "job.yaml")
    assert line.endswith("not readable as YAML: its aliases stand for more than 100,000 values")


def test_aliases_in_an_option():
    nested = "[ha]"
    options = ["run.x=" + "{" + ", ".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else nested] * 9)}]"
                                          for n in range(9)) + "}"]  # fmt: skip
    assert "its aliases stand for more than" in refused(parse_options, options)


@pytest.mark.parametrize("form", ["a{n}: ${{a{m}}}${{a{m}}}", "a{n}: ['${{a{m}}}', '${{a{m}}}']"])
def test_interpolations_that_double(tmp_path, form):
    lines = ["a0: ha", *(form.format(n=n, m=n - 1) for n in range(1, 41))]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    assert "its interpolations (${...}) stand for more than 100,000 values" in refused(
        read_job, str(tmp_path / "job.yaml")
    )


def test_honest_aliases_and_interpolations_pass(tmp_path):
    text = "base: &base {x: 1, y: '${..z}'}\nmodel: {<<: *base, z: '${base.x}', w: [*base, *base]}\nz: '${z}'\n"
    (tmp_path / "job.yaml").write_text(text)
    sections, _ = read_job(str(tmp_path / "job.yaml"))
    assert sections.model.z == 1 and sections.model.w[1].x == 1


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_not_waited_for(tmp_path, make):
    make(tmp_path / "job.yaml")
    assert "is no regular file but a device, a pipe or the like" in refused(read_job, str(tmp_path / "job.yaml"))
    assert "it is no regular file" in refused(read_yaml, tmp_path / "job.yaml")


def test_gigabytes_are_not_read(tmp_path):
    with open(tmp_path / "job.yaml", "wb") as handle:
        handle.truncate(8 << 30)
    assert "it has more than 1,000,000 bytes" in refused(read_yaml, tmp_path / "job.yaml")


def test_options_of_megabytes():
    line = refused(parse_options, ["run.x=" + "1" * 200_000])
    assert "has 200,006 letters" in line and len(line) < 300
    assert "more than 1,000,000 letters" in refused(parse_options, ["run.x=" + "1" * 99_000] * 11)


@pytest.mark.parametrize("value", ['"a\\0b"', '["a\\0b"]', '{"a\\0b": 1}'])
def test_a_nul_character_anywhere(tmp_path, value):
    from lavis_dcd.job import load_config

    (tmp_path / "job.yaml").write_text(
        f"model: {{arch: dcd}}\ndatasets: {{shape_scenes: {{}}}}\nrun: {{resume: {value}}}"
    )
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "job.yaml"))
    assert any("NUL character" in line for line in caught.value.faults)
