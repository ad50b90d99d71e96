"""The web app: chat, ranking, demonstrations, and running campaigns.

    add_pages(app, backend, store, settings)     pages, scripts and the JSON API, on a FastAPI app

    pages.py       the app: routes, static files, error pages
    site.py        what all routes share: settings, templates
    security.py    headers, sessions, CSRF, roles
    markdown.py    replies as HTML that can't hold a script
    replies.py     replies that run: streamed, stopped, kept
    entry.py       invitations, sessions, consent, deletion of one's own data
    chat.py        the chat and its feedback
    labelling.py   the labellers' API, and their pages
    review.py      the adjudication queue
    campaigns.py   campaigns: set-up, tasks, progress, statistics
    sampling.py    alternatives to picked replies, sampled in the background
    people.py      people, invitations, API keys, the audit, earlier exports
    templates/     Jinja, escaped
    static/        one style sheet, small modules by page; no build step

Scripts get text and the HTML that `markdown.py` rendered; they set innerHTML from the latter alone.
"""

from gptlab.people.web.pages import add_pages, admin_link
from gptlab.people.web.site import Settings

__all__ = ["Settings", "add_pages", "admin_link"]
