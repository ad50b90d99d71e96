"""The whole way in a browser: a writer gets help, says what is good and bad, and it is exported.

    python -m benchmarks.walkthrough --model=runs/smollm2
    python -m benchmarks.walkthrough --upstream=http://127.0.0.1:8001

Starts gptlab.serve with a store of its own, and Chromium. An admin comes in by the first invitation
and invites a writer, who gives the model notes about a scientific discovery and asks for help with
an article over five turns. The last one asks what only the notes of the first one say; the same
question in a new chat shows what the model answers without them. The writer gives a thumb down and
one up to two replies to one turn, and writes a better version of another. Then gptlab.export runs,
and the records it wrote have to hold all of it.

Prints what was said and checked, and the same as one line of JSON; exit code 1 if a check fails.
--images writes screenshots: the chat and the ranking page on a desktop and on a phone. Replies are
short, so that a model of 135M parameters takes some four minutes on two CPU cores. Needs the
extras serve and dev, and Debian's chromium.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from gptlab.data.records import Comparison, Conversation, RecordReader
from gptlab.run.errors import UserError

NOTES = (
    "Notes for my article. On 10 April 2019 astronomers showed the first image of a black hole. It "
    "is in the galaxy Messier 87, 55 million light years from Earth. The image shows a bright ring "
    "of hot gas around a dark shadow. Eight radio telescopes on four continents worked together as "
    "the Event Horizon Telescope."
)
TURNS = (
    "Please suggest a title for my article.",
    "Now write its first sentence.",
    "Explain in one sentence why the image has a dark shadow.",
    "Write a closing sentence for the article.",
    "In which galaxy is the black hole of my notes? Answer with its name.",
)
ANSWER = re.compile(r"Messier\s*87|M\s?87", re.IGNORECASE)
BETTER = (
    "On 10 April 2019 the world saw what no light can leave: a black hole, as a dark shadow in a "
    "ring of glowing gas."
)
REASON = "It is too long for a title."
DESK: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
COLORS = 64  # of a screenshot: as many as flat pages need
PATIENCE = 300_000  # milliseconds for one reply


def main() -> None:
    """Runs the walk-through."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", help="a workdir with a chat model")
    where.add_argument("--upstream", help="URL of a server with OpenAI's API")
    parser.add_argument("--workdir", help="where store and export stay; else they are removed")
    parser.add_argument("--images", help="a directory for screenshots")
    parser.add_argument("--tokens", type=int, default=60, help="at most, of a reply")
    parser.add_argument("--temperature", type=float, default=0.5, help="of replies")
    args = parser.parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        parser.error("Chromium is not installed: apt-get install chromium")
    try:
        run(args, browser)
    except UserError as error:
        parser.error(str(error))


def run(args: argparse.Namespace, browser: str) -> None:
    """Serves, walks, exports, and exits with 1 if something is missing."""
    with contextlib.ExitStack() as stack:
        place = Path(args.workdir or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        url, invitation = stack.enter_context(served(args, place))
        playwright = stack.enter_context(sync_playwright())
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        images = Path(args.images) if args.images else None
        said, without = walk(chromium, url, invitation, images)
        chromium.close()
        checks = {
            "the last turn's answer is in the notes of the first": bool(ANSWER.search(said[-1])),
            **exported(place, said),
        }
    for turn, reply in zip(TURNS, said, strict=True):
        print(f"\n> {turn}\n{reply}")
    print(f"\nIn a new chat, without the notes:\n> {TURNS[-1]}\n{without}\n")
    for name, held in checks.items():
        print(f"{'ok    ' if held else 'FAILED'} {name}")
    print(json.dumps({"replies": said, "without": without, "checks": checks}))
    sys.exit(0 if all(checks.values()) else 1)


@contextlib.contextmanager
def served(args: argparse.Namespace, place: Path) -> Iterator[tuple[str, str]]:
    """A server of the model: (its URL, the first admin's link)."""
    source = f"--config.upstream={args.upstream}"
    config = "configs/serve.py"
    if args.upstream is None:
        config, source = f"configs/serve.py:assistant={args.model}", "--config.engine.slots=4"
    command = [
        sys.executable, "-m", "gptlab.serve", f"--config={config}", source,
        f"--workdir={place / 'serve'}", "--config.port=0",
        f"--config.web.max_tokens={args.tokens}", f"--config.web.temperature={args.temperature}",
        "--config.web.reply_seconds=300.0", "--config.engine.deadline_seconds=300.0",
    ]  # fmt: skip
    log = place / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        found = None
        while found is None:
            found = re.search(r"comes in by (http://\S+?)(/join/\S+)", log.read_text())
            if process.poll() is not None:
                raise UserError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield found[1], found[2]
    finally:
        process.terminate()
        process.wait()


def walk(browser: Browser, url: str, invitation: str, images: Path | None) -> tuple[list[str], str]:
    """What people do. Returns the replies that the writer left standing, and that of a new chat."""
    admin = browser.new_page(base_url=url, viewport=DESK)
    admin.goto(invitation)
    admin.fill("[name=name]", "Ada")
    admin.click("text=Join")
    admin.wait_for_url("**/campaigns")
    admin.goto("/people")
    admin.select_option("form[action='/people/invite'] [name=role]", "user")
    admin.click("text=Make a link")
    link = admin.locator("[data-copied]").input_value()

    context = browser.new_context(base_url=url, viewport=DESK, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(link)
    page.fill("[name=name]", "Wren")
    page.click("text=Join")
    page.wait_for_url("**/chat")
    page.click("text=Yes, it may")
    said = chat(page)
    page.locator(".turn.user").nth(1).evaluate("turn => turn.scrollIntoView()")
    shot(page, images, "chat")
    phone = browser.new_context(base_url=url, viewport=PHONE, color_scheme="dark")
    phone.add_cookies(
        [{"name": c["name"], "value": c["value"], "url": url} for c in context.cookies()]
    )
    small = phone.new_page()
    small.goto(page.url)
    small.locator(".turn.assistant .actions").last.wait_for()
    small.evaluate("document.scrollingElement.scrollTop = document.body.scrollHeight")
    shot(small, images, "chat-phone")

    page.goto("/chat")
    ask(page, TURNS[-1], 1)
    without = last_reply(page)
    if images is not None:
        rank(admin, images)
    return said, without


def chat(page: Page) -> list[str]:
    """The conversation, with its feedback on the way."""
    said = []
    page.click("#context-toggle")
    page.fill("#context", NOTES)
    for number, turn in enumerate(TURNS, 1):
        ask(page, turn, number)
        if number == 1:  # a thumb down with a reason, another try, a thumb up
            page.click("[aria-label='Bad reply']")
            page.check("[value=unhelpful]")
            page.fill(".reasons [name=note]", REASON)
            page.click(".reasons .primary")
            page.locator(".reasons").wait_for(state="detached")
            page.click("[aria-label='Another try']")
            page.locator(".switcher:has-text('2/2')").wait_for()
            page.click("[aria-label='Good reply']")
            page.click(".reasons button:text-is('Close')")
        if number == 2:  # a better version by hand, from which the conversation goes on
            page.locator("text=Write a better reply").last.click()
            page.fill(".editor textarea", BETTER)
            page.click(".editor .primary")
            page.locator(".badge:has-text('your version')").wait_for()
        said.append(last_reply(page))
    return said


def ask(page: Page, text: str, number: int) -> None:
    """Sends a message and waits for the reply to it, the conversation's `number`th."""
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .actions").nth(number - 1).wait_for()
    page.locator("#send:visible").wait_for()


def last_reply(page: Page) -> str:
    """The text of the last reply."""
    return page.locator(".turn.assistant .prose").last.inner_text().strip()


def rank(admin: Page, images: Path) -> None:
    """A campaign that picks replies of the chat and samples others, up to the ranking page."""
    admin.set_default_timeout(PATIENCE)
    admin.goto("/campaigns")
    admin.fill("[name=name]", "Help with articles")
    admin.fill("[name=instructions]", "Prefer what is **true**, then what is helpful.")
    admin.click("text=Make the campaign")
    admin.wait_for_url(re.compile("/campaigns/[^/]+$"))
    campaign = admin.url.rpartition("/")[2]
    admin.fill("[name=count]", "1")
    admin.fill("[name=alternatives]", "2")
    admin.click("text=Pick and sample")
    admin.locator(".note:has-text('1 of 1 picked replies queued'):not([data-running])").wait_for()
    admin.goto(f"/label/{campaign}")
    admin.click("text=Yes, it may")
    admin.locator(".board").wait_for()
    admin.locator("#consent-banner").wait_for(state="detached")
    for key in ("j", "2", "j", "1", "j", "3"):
        admin.keyboard.press(key)
    admin.locator(".rank-layout").evaluate("layout => layout.scrollIntoView()")
    shot(admin, images, "ranking")
    admin.emulate_media(color_scheme="dark")
    admin.set_viewport_size(PHONE)
    admin.locator(".reply").first.scroll_into_view_if_needed()
    shot(admin, images, "ranking-phone")


def shot(page: Page, images: Path | None, name: str) -> None:
    """A screenshot with few colours."""
    if images is None:
        return
    page.locator(".toast").last.wait_for(state="detached")
    images.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(COLORS, dither=Image.Dither.NONE).save(images / f"{name}.png", optimize=True)


def exported(place: Path, said: list[str]) -> dict[str, bool]:
    """Runs the export; whether what the writer did is in it."""
    command = [
        sys.executable, "-m", "gptlab.export", "--config=configs/export.py",
        f"--workdir={place / 'export'}",
        f"--config.store.url=sqlite:///{(place / 'serve' / 'store.sqlite').resolve()}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    written = list(read(place / "export" / "records", "conversations", Conversation))
    better = [c for c in written if c.messages[-1].content == BETTER]
    compared = list(read(place / "export" / "records", "comparisons", Comparison))
    ranked = [best_first(one) for one in compared]
    thumbs = [
        one for one, order in zip(compared, ranked, strict=True)
        if one.weight < 1 and one.prompt.messages[-1].content == TURNS[0] and len(order) == 2
    ]  # fmt: skip
    return {
        "the better reply is a conversation to imitate": len(better) == 1,
        "it has the notes and the turns before it": len(better) == 1
        and better[0].messages[0].context == NOTES
        and [m.content for m in better[0].messages if m.role == "user"] == list(TURNS[:2]),
        "the better reply is preferred to the model's": any(o[0] == BETTER for o in ranked),
        "the thumbs are a weak comparison": len(thumbs) == 1,
    }


def best_first(comparison: Comparison) -> list[str]:
    """The replies by rank."""
    order = sorted(zip(comparison.ranks, comparison.candidates, strict=True), key=lambda p: p[0])
    return [candidate.content for _, candidate in order]


def read(directory: Path, name: str, cls: Any) -> Iterator[Any]:
    """The records of a name, whichever split they are in."""
    for split in ("train", "validation"):
        if list(directory.glob(f"{name}-{split}*")):
            yield from RecordReader(directory, name, split, cls)


if __name__ == "__main__":
    main()
