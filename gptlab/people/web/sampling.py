"""Alternatives to replies picked from chats, sampled in the background for a ranking campaign."""

from __future__ import annotations

import asyncio
import logging
import random

from starlette.concurrency import run_in_threadpool

from gptlab.data.records import Candidate
from gptlab.people.backend import Ask, Busy, Invalid, Refused, Unavailable
from gptlab.people.store import NotFound
from gptlab.people.store.campaigns import Picked
from gptlab.people.web.site import Site
from gptlab.run import errors
from gptlab.run.errors import UserError

_LOG = logging.getLogger(__name__)
_EXPLAINED = (Unavailable, NotFound, UserError)
_FAILURES = 3  # of the model in a row that end a run: it is gone, and not only for a moment


class Sampling:
    """One run for one campaign, with how far it is. Make it with `begin`."""

    def __init__(self, site: Site, campaign: str, actor: str, count: int, alternatives: int):
        self.wanted, self.queued, self.left_out = 0, 0, 0
        self.error = ""
        self._site, self._campaign, self._actor = site, campaign, actor
        self._count, self._alternatives = count, alternatives
        self._task = asyncio.create_task(self._run())

    @property
    def running(self) -> bool:
        """Whether there is more to come."""
        return not self._task.done()

    def stop(self) -> None:
        """Ends it; what is queued stays."""
        self._task.cancel()

    async def ended(self) -> None:
        """Waits until it has stopped."""
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        store = self._site.store.campaigns
        try:
            seed = random.SystemRandom().randrange(2**31)  # which ones: people's, by chance
            picked = await run_in_threadpool(store.pick, self._campaign, self._count, seed)
            self.wanted = len(picked)
            failed = 0  # in a row
            for item in picked:
                try:
                    others, failed = await self._sample(item), 0
                    if others:
                        await run_in_threadpool(
                            store.queue_picked, self._campaign, item, others, self._actor
                        )
                except NotFound:  # its chat has been deleted meanwhile
                    others = []
                except Unavailable:
                    others, failed = [], failed + 1
                    if failed == _FAILURES:
                        raise
                self.queued += bool(others)
                self.left_out += not others
        except Exception as error:
            # What a defect says may hold a chat's text: it goes neither to the page nor to the log.
            self.error = str(error) if isinstance(error, _EXPLAINED) else type(error).__name__
            _LOG.error("sampling for campaign %s: %s", self._campaign, errors.place(error))

    async def _sample(self, item: Picked) -> list[Candidate]:
        """Replies that differ from the picked one and from each other, as far as there are any."""
        settings = self._site.settings
        models = {model.name: model for model in self._site.backend.models()}
        model = models.get(item.model) or next(iter(models.values()))
        found: dict[str, Candidate] = {}
        index = 0
        while index < 2 * self._alternatives and len(found) < self._alternatives:
            ask = Ask(
                model.name, item.prompt.messages, settings.max_tokens, settings.temperature,
                top_p=settings.top_p, index=index,
            )  # fmt: skip
            text, finished, policy = "", False, model.policy
            try:
                async for piece in self._site.backend.reply(ask, settings.reply_seconds):
                    text += piece.text
                    finished, policy = piece.finish_reason == "stop", piece.policy or policy
            except Busy as busy:  # people in the chat come first
                await asyncio.sleep(busy.retry_after)
                continue
            except (Invalid, Refused):
                break
            index += 1
            if text.strip() and text != item.reply.content and text not in found:
                found[text] = Candidate(f"{item.reply.id}:{ask.index}", text, policy, finished)
        return list(found.values())


def begin(site: Site, campaign: str, actor: str, count: int, alternatives: int) -> Sampling:
    """Starts sampling for a campaign, unless that is going on."""
    known = site.sampling.get(campaign)
    if known is None or not known.running:
        known = site.sampling[campaign] = Sampling(site, campaign, actor, count, alternatives)
    return known
