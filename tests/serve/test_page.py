"""The page in a browser: a conversation about pictures, edited and retried, at three sizes and without the internet."""

import json
from dataclasses import replace

import httpx2
import pytest

from llava_jax.serve import fetcher
from tests.serve.browser import CHROMIUM, page
from tests.serve.running import data_url, running
from tests.serve.web import HOST, png, web

SIZES = {"phone": (400, 740), "tablet": (768, 1024), "desk": (1200, 800)}
DROP = """(async () => {
  const files = await Promise.all(%s.map(async (url, i) => {
    const bytes = Uint8Array.from(atob(url.split(",")[1]), letter => letter.charCodeAt(0));
    return new File([bytes], `${i}.png`, { type: "image/png" });
  }));
  const transfer = new DataTransfer();
  files.forEach(file => transfer.items.add(file));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true, bubbles: true }));
})()"""


@pytest.fixture(scope="module")
def served():
    with running() as one:
        yield one


def test_the_page_may_connect_to_its_own_server_alone(served):
    found = httpx2.get(served.url)
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "http://" not in found.text and "https://" not in found.text and "innerHTML" not in found.text


@pytest.mark.skipif(CHROMIUM is None, reason="wants chromium")
@pytest.mark.parametrize("size", SIZES)
def test_a_conversation_about_two_pictures_in_a_browser(served, tmp_path, size):
    urls = [data_url(0), data_url(1)]
    with page(*SIZES[size]) as one:
        one.open(served.url)
        one.wait("document.getElementById('title')?.textContent === 'llava-jax'")
        assert one.run("$('open-address').hidden")
        one.run("$('max_tokens').value = 8")
        one.run(DROP % json.dumps(urls))
        one.wait("document.querySelectorAll('#chosen img').length === 2")
        one.run("$('text').value = 'What <b>is</b> it?'; $('send').click()")
        one.wait("turns.length === 2 && turns[1].usage && !running")
        body = {"messages": one.run("messages(1)"), "max_tokens": 8, "temperature": 0}
        assert body["messages"][0]["content"][0]["image_url"]["url"] == urls[0]
        expected = served.chat(body).json()
        assert one.run("turns[1].text") == expected["choices"][0]["message"]["content"]
        shown = one.run("document.querySelector('main').innerText")
        assert f"{expected['usage']['prompt_tokens']} tokens read" in shown and "What <b>is</b> it?" in shown
        one.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Prompt').click()")
        one.wait("$('prompt').open")
        assert one.run("document.querySelectorAll('#prompt-tokens .picture').length") == 2
        one.screen(tmp_path / f"{size}.png")
        one.run("$('prompt').close()")
        one.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Retry').click()")
        one.wait("turns.length === 2 && turns[1].usage && !running")
        assert one.run("turns[1].text") == expected["choices"][0]["message"]["content"]
        one.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Edit').click()")
        assert one.run("[$('text').value, chosen.length, turns.length]") == ["What <b>is</b> it?", 2, 0]
        assert one.run("document.documentElement.scrollWidth <= innerWidth")
        assert one.errors == []
        assert all(url.startswith((served.url, "data:", "blob:")) for url in one.requests)


@pytest.mark.skipif(CHROMIUM is None, reason="wants chromium")
def test_an_error_of_the_server_is_shown_and_the_question_can_be_asked_again(served):
    with page(*SIZES["phone"]) as one:
        one.open(served.url)
        one.wait("document.getElementById('title')?.textContent === 'llava-jax'")
        dot = "'data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs='"
        one.run(f"chosen = [{dot}]; $('temperature').value = 5; $('text').value = 'Hello'; $('send').click()")
        one.wait("turns.length === 2 && turns[1].error")
        assert "temperature=5" in one.run("document.querySelector('main').innerText")
        one.run("$('text').value = 'Hello again'; $('send').click()")
        one.wait("turns[0].text === 'Hello again' && turns[1].error")
        assert one.run("[turns.length, turns[0].images.length]") == [2, 1]  # the picture stays with the question
        one.run("$('temperature').value = 0; $('max_tokens').value = 4")
        one.run("[...document.querySelectorAll('button')].find(b => b.textContent === 'Retry').click()")
        one.wait("turns.length === 2 && turns[1].usage && !running")
        one.run("$('max_tokens').value = 400; $('text').value = 'More'; $('send').click()")
        one.wait("running")
        one.run("$('send').click()")
        one.wait("!running && turns[3].error === 'stopped'")
        assert served.idle()


@pytest.mark.skipif(CHROMIUM is None, reason="wants chromium")
def test_where_the_server_fetches_pictures_the_page_takes_addresses(tmp_path, monkeypatch):
    hosts = fetcher.hosts(f"http://{HOST}")
    with (web(monkeypatch) as internet, page(*SIZES["phone"]) as one,
          running(make=lambda service: replace(service, fetcher=fetcher.Fetcher(hosts))) as served):  # fmt: skip
        internet.shows("/a.png", png())
        assert f"img-src data: blob: http://{HOST};" in httpx2.get(served.url).headers["content-security-policy"]
        one.open(served.url)
        one.wait("!$('open-address').hidden")
        one.run("$('open-address').click()")
        one.run(f"$('url').value = 'http://{HOST}/a.png'")
        one.screen(tmp_path / "address.png")
        one.run("document.querySelector('#address-form button').click()")
        one.wait("chosen.length === 1 && !$('address').open")
        one.run("$('max_tokens').value = 4; $('text').value = 'What is it?'; $('send').click()")
        one.wait("turns.length === 2 && turns[1].usage && !running")
        assert internet.seen == [("/a.png", HOST)] and one.run("document.documentElement.scrollWidth <= innerWidth")
        one.run("$('open-address').click()")
        one.run("[...document.querySelectorAll('#address-form button')].at(-1).click()")
        one.wait("!$('address').open && chosen.length === 0")
