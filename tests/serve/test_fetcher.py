"""Pictures by address: which hosts and addresses are asked, and what becomes of a host that does not behave."""

import concurrent.futures
import shutil
import subprocess
import time
from dataclasses import replace

import httpx2
import pytest

from llava_jax.errors import UsageError
from llava_jax.serve import fetcher
from tests.serve.running import data_url, running, user
from tests.serve.web import HOST, PUBLIC, png, web

URL = f"http://{HOST}/a.png"
FIELD = "messages[0].content[1].image_url.url"


@pytest.fixture(scope="module")
def served():
    hosts = fetcher.hosts(f"http://{HOST},http://other.example.com:8080")
    with running(make=lambda service: replace(service, fetcher=fetcher.Fetcher(hosts))) as one:
        yield one


@pytest.fixture
def internet(monkeypatch):
    with web(monkeypatch) as one:
        one.addresses["other.example.com"] = [[PUBLIC]]
        yield one


def ask(served, *urls: str, path: str = "/v1/chat/completions"):
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return served.post(path, {"messages": [user("What is it?", *shown)], "max_tokens": 4, "temperature": 0})


def refusal(served, url: str = URL) -> str:
    found = ask(served, url)
    error = found.json()["error"]
    assert found.status_code == 400 and error["param"] == FIELD and served.idle(), error
    return error["message"]


def test_a_host_is_a_name_of_the_internet():
    assert fetcher.hosts("Example.com, http://a-b.example.com:8080,example.org:8443") == (
        ("https", "example.com", 443), ("http", "a-b.example.com", 8080), ("https", "example.org", 8443))  # fmt: skip
    assert [host.netloc for host in fetcher.hosts("example.com:443,http://example.com:81")] == [
        "example.com", "example.com:81"]  # fmt: skip
    for text in ("", "localhost", "*", "*.example.com", "127.0.0.1", "127.0.0.0x1", "2130706433", "[::1]", "a..com",
                 "example.com.", "example.com/a", "https://", "ftp://example.com", "me@example.com", "-a.example.com",
                 "example.com:0", "example.com:65536", "example.com,", "exämple.com", "example.com\n,b"):  # fmt: skip
        with pytest.raises(UsageError, match="--picture-hosts .*want names"):
            fetcher.hosts(text)


def test_only_addresses_of_the_internet_are_public():
    for address in ("93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"):
        assert fetcher.is_public(address), address
    for address in PRIVATE:
        assert not fetcher.is_public(address), address


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.5.4", "192.168.1.1", "100.64.0.1", "100.100.100.200",
    "169.254.169.254", "192.0.0.192", "168.63.129.16", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "192.0.2.1", "198.18.0.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:93.184.216.34", "::127.0.0.1", "fe80::1",
    "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe",
    "2002:7f00:1::", "2001::7f00:1", "2001:db8::1",
]  # fmt: skip


def test_a_picture_by_address_is_answered_as_its_bytes_are(served, internet):
    internet.shows("/a.png", png(0))
    internet.shows("/b.png?size=1", png(1))
    by_address = ask(served, URL, f"HTTP://{HOST.upper()}/b.png?size=1", URL)
    assert by_address.status_code == 200, by_address.text
    by_bytes = ask(served, data_url(0), data_url(1), data_url(0))
    assert by_address.json()["choices"] == by_bytes.json()["choices"]
    assert by_address.json()["usage"]["prompt_tokens"] == by_bytes.json()["usage"]["prompt_tokens"]
    assert internet.seen == [("/a.png", HOST), ("/b.png?size=1", HOST)]  # each once
    letters = "".join(map(chr, range(33, 127))).replace("#", "").replace("\\", "")
    assert "no HTTP" in refusal(served, f"http://{HOST}/{letters}") and len(internet.seen) == 3  # there is no such page
    prompts = [ask(served, url, path="/v1/prompt").json()["ids"] for url in (URL, data_url(0))]
    assert prompts[0] == prompts[1] and served.idle()


def test_the_address_that_was_checked_is_the_one_that_is_dialled(served, internet):
    internet.shows("/a.png", png())
    internet.addresses[HOST] = [[PUBLIC], ["127.0.0.1"]]  # a second lookup would find this machine
    assert ask(served, URL).status_code == 200
    assert internet.dialled == [(PUBLIC, 80)] and internet.lookups == [HOST]
    assert "not public" in refusal(served)
    assert len(internet.dialled) == 1


def test_redirects_are_followed_three_times_and_each_is_checked(served, internet):
    for number in range(1, 5):
        internet.shows(f"/{number}", b"", 302, Location=f"/{number - 1}")
    internet.shows("/0", png())
    assert ask(served, f"http://{HOST}/3").status_code == 200
    assert "more than 3 times" in refusal(served, f"http://{HOST}/4")
    internet.shows("/away", b"", 307, Location="http://other.example.com:8080/0")
    assert ask(served, f"http://{HOST}/away").status_code == 200
    assert internet.seen[-1] == ("/0", "other.example.com:8080")
    internet.addresses["other.example.com"] = [["10.0.0.1"]]
    assert "not public" in refusal(served, f"http://{HOST}/away")
    before = len(internet.dialled)
    for place in ("http://127.0.0.1/", "https://example.com/", "//localhost/", "file:///etc/passwd", "ftp://a/",
                  "\\\\a", f"http://{HOST}:81/", f"http://me@{HOST}/", f"https://{HOST}/", "http://169.254.169.254/",
                  "http://[::1/", "http://[a]/", "//[", "\xe9"):  # fmt: skip
        internet.shows("/a.png", b"", 301, Location=place)
        assert "redirects to" in refusal(served)
    assert len(internet.dialled) == before + 14  # the host itself, and nothing else


def test_an_answer_that_is_no_picture_is_refused(served, internet):
    internet.shows("/a.png", b"not here", 404)
    assert "status 404" in refusal(served)
    internet.shows("/a.png", b"<html>")
    assert "cannot identify" in refusal(served) or "not a picture" in refusal(served)
    internet.shows("/a.png", png(), Content_Encoding="gzip")
    assert "packed" in refusal(served)
    internet.pages["/a.png"] = lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")
    assert "no HTTP" in refusal(served)
    internet.pages["/a.png"] = lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
    assert "no HTTP" in refusal(served)
    internet.addresses[HOST] = [[]]
    assert "no connection" in refusal(served)


def test_bytes_and_time_are_counted_while_they_come(served, internet, monkeypatch):
    sent = []

    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(bytes(100_000))
            sent.append(100_000)

    def slow(handler):
        for letter in b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 100:
            handler.wfile.write(bytes([letter]))
            time.sleep(0.05)

    internet.pages["/a.png"] = endless
    assert "longer than 20,000,000 bytes" in refusal(served)
    assert sum(sent) < 40_000_000
    monkeypatch.setattr(fetcher, "FETCH_SECS", 0.5)
    internet.pages["/a.png"] = slow
    start = time.monotonic()
    assert "did not come within 0.5 s" in refusal(served)
    assert time.monotonic() - start < 10
    found = ask(served, *(f"http://{HOST}/{number}" for number in range(17)))
    assert found.status_code == 400 and "17 addresses of pictures" in found.json()["error"]["message"]


def test_a_client_that_goes_while_its_picture_comes_leaves_nothing_behind(served, internet):
    internet.pages["/a.png"] = lambda _: time.sleep(3)
    body = {"messages": [user("What is it?", {"type": "image_url", "image_url": {"url": URL}})]}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(served.url + "/v1/chat/completions", json=body, timeout=0.5)
    assert internet.seen and served.idle(2)


def test_pictures_are_fetched_by_few_at_once(served, internet):
    open_now, most = [], []

    def page(handler):
        open_now.append(1)
        most.append(len(open_now))
        time.sleep(0.2)
        open_now.pop()
        internet.pages["/b.png"](handler)

    internet.pages["/a.png"] = page
    internet.shows("/b.png", png())
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: ask(served, URL), range(16)))
    assert {one.status_code for one in found} == {200} and 2 <= max(most) <= fetcher.FETCHES


def test_s5_of_hostile_addresses_none_is_asked_where_a_list_is_on(served, internet):
    def names(host: str) -> list[str]:
        return [f"http://{host}/a.png", f"https://{host}:8080/a.png"]

    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "0.0.0.0",
             "[::ffff:127.0.0.1]", f"{HOST}@127.0.0.1", f"127.0.0.1#@{HOST}", f"127.0.0.1\\@{HOST}", f"{HOST}.",
             f"a.{HOST}", f"{HOST}.evil.com", f"evil{HOST}", f"user:secret@{HOST}", HOST.replace(".", "。"),
             f"{HOST}%00.evil.com"]  # fmt: skip
    urls = [url for host in hosts for url in names(host)]
    urls += [f"https://{HOST}/a.png", f"http://{HOST}:22/a.png", f"http://{HOST}", f"http://{HOST}/ a",
             f"http://{HOST}/\r\na", f"http://{HOST}/#a", f"http:/{HOST}/a", f"http:{HOST}/a", f" http://{HOST}/a",
             "http://", "https:///a"]  # fmt: skip
    assert len(urls) >= 40
    for url in urls:
        assert "URL" in refusal(served, url)
    assert internet.lookups == [] and internet.dialled == []
    for addresses in ([one] for one in PRIVATE if "%" not in one):
        internet.addresses[HOST] = [addresses]
        assert "not public" in refusal(served)
    internet.addresses[HOST] = [[PUBLIC, "192.168.0.1"]]  # one of them is enough
    assert "not public" in refusal(served)
    assert internet.dialled == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="wants openssl")
def test_https_wants_the_certificate_of_the_name(tmp_path, monkeypatch):
    both = tmp_path / "both.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out",
                    "cert.pem", "-days", "2", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"],
                   cwd=tmp_path, check=True, capture_output=True)  # fmt: skip
    both.write_text((tmp_path / "cert.pem").read_text() + (tmp_path / "key.pem").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    hosts = fetcher.hosts(f"{HOST},wrong.example.com")
    with (web(monkeypatch, both) as internet,
          running(make=lambda service: replace(service, fetcher=fetcher.Fetcher(hosts))) as served):  # fmt: skip
        internet.shows("/a.png", png())
        assert ask(served, f"https://{HOST}/a.png").status_code == 200
        assert internet.dialled == [(PUBLIC, 443)] and internet.seen == [("/a.png", HOST)]
        internet.addresses["wrong.example.com"] = [[PUBLIC]]
        assert "CERTIFICATE_VERIFY_FAILED" in refusal(served, "https://wrong.example.com/a.png")
        assert len(internet.seen) == 1
