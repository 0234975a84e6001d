import errno
import os

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.training.writing import writing_into


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device.*free some space"),
        (errno.EDQUOT, "Disk quota exceeded.*free some space"),
        (errno.EROFS, "Read-only file system.*make its disk writable"),
        (errno.EACCES, "Permission denied.*permit it"),
        (errno.EIO, "Input/output error.*put that right"),
    ],
)
def test_what_the_disk_refuses_is_one_line(tmp_path, number, words):
    line = rf"run\.output_dir: .*x\.json cannot be written \({words}"
    with pytest.raises(UserError, match=line) as caught, writing_into(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x.json"))
    assert len(caught.value.faults) == 1 and "run.resume=auto goes on" in caught.value.faults[0]


def test_a_folder_that_is_gone_before_or_meanwhile(tmp_path):
    folder = tmp_path / "job"
    with pytest.raises(UserError, match=r"the run folder .*job is gone"), writing_into(folder):
        raise AssertionError
    folder.mkdir()
    with pytest.raises(UserError, match=r"the run folder .*job is gone"), writing_into(folder):
        folder.rmdir()
        (folder / "x").write_text("x")


def test_other_errors_pass(tmp_path):
    with pytest.raises(ValueError, match="other"), writing_into(tmp_path):
        raise ValueError("other")
