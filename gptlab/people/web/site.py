"""What all routes share: the app's parts, its settings and templates."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response
from starlette.templating import Jinja2Templates

from gptlab.people.backend import Backend
from gptlab.people.store import Store
from gptlab.people.web import markdown

if TYPE_CHECKING:
    from gptlab.people.web.replies import Running
    from gptlab.people.web.sampling import Sampling
    from gptlab.people.web.security import Visitor

TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the web app is run.

    Attributes:
      name: what the app is called on its pages.
      open_chat: whether anybody may chat; otherwise an invitation is needed.
      secure: whether people come by https (a proxy in front, say): cookies are for https alone.
      artifacts: the directory below which an admin may queue `collect` artifacts as tasks, and sees
        what was made of exports; None: there is none.
      temperature, top_p: of the replies in the chat.
      max_tokens: of a reply; None: as many as fit.
      reply_seconds: after which a reply is cut off.
      replies_at_once: how many one person may have running.
    """

    name: str
    open_chat: bool
    secure: bool
    artifacts: str | None
    temperature: float
    top_p: float
    max_tokens: int | None
    reply_seconds: float
    replies_at_once: int


@dataclasses.dataclass(frozen=True)
class Site:
    """One app's parts. `running`: replies by their token; `sampling`: by campaign."""

    backend: Backend
    store: Store
    settings: Settings
    templates: Jinja2Templates
    running: dict[str, Running]
    sampling: dict[str, Sampling]

    def page(
        self,
        request: Request,
        template: str,
        visitor: Visitor | None,
        status: int = 200,
        **context: Any,
    ) -> Response:
        """Renders a template; `visitor` is whose menu and CSRF token it has."""
        context |= {"visitor": visitor, "site": self.settings}
        return self.templates.TemplateResponse(request, template, context, status_code=status)


def _site(request: Request) -> Site:
    return request.app.state.site


SiteOf = Annotated[Site, Depends(_site)]


def load_templates() -> Jinja2Templates:
    """The pages, with autoescaping."""
    templates = Jinja2Templates(directory=TEMPLATES)
    env = templates.env
    env.trim_blocks = env.lstrip_blocks = True
    env.filters |= {
        "markdown": markdown.render,
        "moment": _moment,
        "duration": _duration,
        "percent": _percent,
    }
    return templates


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}%"
