from __future__ import annotations

import pytest

from lavis_dcd.common.address import Address, looks_like_address
from lavis_dcd.common.errors import UserError

SHA = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        "http://", "https:///x", "http:x", "https://h", "https://h/", "https://h?q=1", "https://h/a/..", "https://h/.",
        "https://h/..%2f..%2fx", "https://h/a%00b", "https://h/a b", " https://h/a", "https://h/a\n", "https://h/a\0b",
        "https://h:port/x", "https://h:99999/x", "https://h:-1/x", "https://h:0/x", "http://[::1/x", "http://::1]/x",
        "http://[zz]/x", "https://[::1]evil:80/x", "http://a[::1]/x", "file:///etc/passwd", "ftp://h/x", "s3://h/x",
        "https://h/" + "a" * 5000, "https://h/" + "a" * 201, "https://h/x.pth.part", "https://h/x.download.json",
        "https://" + "a" * 64 + ".com/x", "https://a..b/x", "https://h/é", "https://ä.de/x", "https://h/%e9",
        "https://h/x\\@evil/y", "https://h/.x", "https://h/x;y", "https://h/%E2%80%AEx", "https://h/%zz", "https://h/%",
        "https://h/x%0a", "https://h/x%5cy", "https://exa mple/x", "https://-/\ud800",
    ],
)  # fmt: skip
def test_an_odd_address_is_one_line(text):
    with pytest.raises(UserError) as caught:
        Address.parse(text)
    (line,) = caught.value.faults
    assert line.isprintable() and len(line) < 700


@pytest.mark.parametrize(
    "text", ["https://h/x", "HTTP://[::1]:8080/a/x.pth", "https://h/a%20b.pth?download=1", "https://a_b.c-d.e./x"]
)
def test_a_sound_address_is_taken(text):
    assert Address.parse(text).file_name in ("x", "x.pth", "a b.pth")


@pytest.mark.parametrize(
    ("text", "secrets"),
    [
        ("https://user:pa55@h/x", ["user", "pa55"]),
        ("https://ghp_0123@h/x", ["ghp_0123"]),
        ("https://user:p@55@h/x", ["user", "p@55", "55"]),
        ("https://h/x?token=tok3n&download=true", ["tok3n"]),
        ("https://h/x?X-Amz-Signature=5igned&X-Amz-Credential=cr3d", ["5igned", "cr3d"]),
        ("https://h/x?sig=5igned&se=2026", ["5igned"]),
        ("https://h/x?ghp_0123", ["ghp_0123"]),
        ("https://h/x?unheard-of=s3cret", ["s3cret"]),
        ("https://h/a;jsessionid=s3cret/x", ["s3cret"]),
        ("https://h/x#access_token=s3cret", ["s3cret"]),
        # odd ones, which are refused with a line
        ("https://user:pa/55@h/x", ["user", "pa/", "pa'", "55"]),
        ("https://user:pa 55@h/x", ["user", "pa ", "55"]),
        ("https://user:pa?55@h:port/x", ["user", "pa?", "55"]),
        ("ftp://user:pa55@h/x", ["user", "pa55"]),
        ("https://user:pa55@h/" + "a" * 5000, ["user", "pa55"]),
    ],
)  # fmt: skip
def test_no_secret_is_shown(text, secrets):
    try:
        address = Address.parse(text)
        texts = [str(address), repr(address), f"{address}", address.shown]
        assert "h/" in address.shown
    except UserError as error:
        texts = [str(error)]
    for said in texts:
        assert not any(secret in said for secret in secrets), said


def test_the_key_says_which_file_and_not_who_reads_it():
    def key(text: str) -> str:
        return Address.parse(text).key

    base = key("https://h/a/x.pth")
    others = [
        "https://h/b/x.pth", "http://h/a/x.pth", "https://h:444/a/x.pth", "https://i/a/x.pth", "https://h/a/x.pth?v=1",
        "https://h/a/x.pth?v=2", "https://h/a/x.pth?token=a", "https://h/a/x.pth?token=b", "https://u@h/a/x.pth",
        "https://h/a/x%2Epth", "https://h/a//x.pth",
    ]  # fmt: skip
    keys = [base, *map(key, others)]
    assert len(set(keys)) == len(keys)
    same = ["https://H/a/x.pth", "https://h:443/a/x.pth", f"https://h/a/x.pth#sha256={SHA}", "HTTPS://h/a/x.pth"]
    assert {key(text) for text in same} == {base}
    assert key("https://u:one@h/x") == key("https://u:two@h/x")
    signed = "https://h/x?v=1&X-Amz-Signature={0}&X-Amz-Date={0}"
    assert key(signed.format("a")) == key(signed.format("b")) != key(signed.format("a").replace("v=1", "v=2"))


def test_a_checksum_at_the_end():
    assert Address.parse(f"https://h/x#sha256={SHA}&egg=y").sums == {"sha256": SHA}
    assert Address.parse("https://h/x#md5=0").sums == {"md5": "0"}
    assert "#" not in Address.parse(f"https://h/x#sha256={SHA}").url


def test_where_a_server_may_send_on_to():
    at = Address.parse("https://u:pw@h/a/x?token=t")
    assert at.authorization == "Basic dTpwdw==" and "pw" not in at.url
    assert at.redirected("/b c").url == "https://h/b%20c"
    assert at.redirected("/b").authorization == at.authorization
    assert at.redirected("https://other/b").authorization is None
    assert at.redirected("https://h:444/b").authorization is None
    assert Address.parse("http://h/x").redirected("https://h/x").url == "https://h/x"
    for place in (
        "http://h/x",
        "ftp://h/x",
        "file:///etc/passwd",
        "gopher://h/x",
        "data:,x",
        "//[bad",
        "",
        None,
        "http:",
    ):
        with pytest.raises(UserError, match=r"redirects") as caught:
            at.redirected(place)
        assert "token=t" not in str(caught.value) and "pw" not in str(caught.value)


def test_what_looks_like_an_address():
    assert all(map(looks_like_address, ("https://h/x", "ftp://h", "s3://b/k", "file:///x", "HTTP:x", "http://[")))
    assert not any(map(looks_like_address, ("a/b.pth", "/a", "asset:x/y", "~/x", "https", "bert-base", "a b://c")))
