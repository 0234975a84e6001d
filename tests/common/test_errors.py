import pickle

from lavis_dcd.common.errors import UserError


def test_one_message_is_one_fault():
    error = UserError("model.width: 3 is odd")
    assert error.faults == ["model.width: 3 is odd"]
    assert str(error) == "model.width: 3 is odd"


def test_several_faults_are_lines_and_survive_a_worker_process():
    error = pickle.loads(pickle.dumps(UserError(["a", "b"])))
    assert error.faults == ["a", "b"]
    assert str(error) == "a\nb"
