from torch import nn

from lavis_dcd.matching.recompute import repeated_layers


def test_stacks_of_one_class_and_not_what_is_inside_their_layers():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stack = nn.ModuleList([inner, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])
    mixed = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    model = nn.ModuleDict({"stack": stack, "mixed": mixed, "one": nn.ModuleList([nn.Linear(2, 2)])})
    assert repeated_layers(model) == [stack[0], stack[1]]
    assert repeated_layers(inner) == [inner[0], inner[1]]
    assert repeated_layers(nn.Linear(2, 2)) == []
