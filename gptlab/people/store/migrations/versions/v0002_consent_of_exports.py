"""Which consent an export asked for. Those made before asked for training, the config's default."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    consent = sa.Column("consent", sa.Text(), nullable=False, server_default="training")
    op.add_column("exports", consent)
