from __future__ import annotations

import pytest

from lavis_dcd.common.address_secrets import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "load checkpoint from https://u:pa55@h/x?token=s3cret&v=2, then ftp://pa55@h/y",
            "load checkpoint from https://***@h/x?token=***&v=2, then ftp://***@h/y",
        ),
        ("finetuned: 'https://u:p@h/x'", "finetuned: 'https://***@h/x'"),
        ("https://h/x#sha256=ab12", "https://h/x#sha256=ab12"),
        ("https://h/x#access_token=s3cret&md5=ab", "https://h/x#md5=ab"),
        ("no address: a@b, c?d=e", "no address: a@b, c?d=e"),
        ("https://h/@scope/x?download=true", "https://h/@scope/x?download=true"),
    ],
)
def test_secrets_in_any_text_are_hidden(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown
