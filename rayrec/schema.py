"""The contract of every stage: actions, and the Arrow schemas of the files that stages hand on.

In: nothing. Out: names and types. It must not know how any of them is read, written or used.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

DATASET_VERSION: Final = 2
BUNDLE_VERSION: Final = 4

ACTIONS: Final = (
    "view", "click", "cart", "remove_from_cart", "favorite", "purchase", "cancel", "rate",
    "like", "dislike", "hide", "share", "follow", "search", "impression",
)  # fmt: skip
"""Canonical actions. Only ever append: the place in this tuple is stored in datasets and bundles."""

ACTION_CODE: Final = {action: code for code, action in enumerate(ACTIONS, start=1)}
"""Code of each action in tensors; 0 is padding."""

SYNONYMS: Final = {
    "pv": "view", "pageview": "view", "page_view": "view", "detail": "view", "product_view": "view", "watch": "view",
    "play": "view", "read": "view", "clk": "click", "tap": "click",
    "add_to_cart": "cart", "addtocart": "cart", "add-to-cart": "cart", "basket": "cart", "add": "cart",
    "removefromcart": "remove_from_cart", "remove": "remove_from_cart",
    "fav": "favorite", "favourite": "favorite", "wishlist": "favorite", "bookmark": "favorite", "collect": "favorite",
    "buy": "purchase", "transaction": "purchase", "order": "purchase", "bought": "purchase", "sale": "purchase",
    "refund": "cancel", "return": "cancel", "cancellation": "cancel",
    "rating": "rate", "review": "rate", "upvote": "like", "thumbs_up": "like", "downvote": "dislike",
    "thumbs_down": "dislike", "not_interested": "hide", "repost": "share", "retweet": "share", "subscribe": "follow",
    "query": "search", "show": "impression", "exposure": "impression", "imp": "impression",
}  # fmt: skip
"""Other names that logs use for the canonical actions, in lower case."""

ENGAGEMENTS: Final = ("view", "click", "cart", "favorite", "purchase", "rate", "like", "share", "follow")
"""Actions that show interest in an item: these make up a user's sequence and are what we predict."""

HEAD_ACTIONS: Final = {
    "view": ("view", "click"),  # logs call a look at an item by either name
    "cart": ("cart",),
    "favorite": ("favorite",),
    "purchase": ("purchase",),
}
"""The actions that a model learns to foresee apart, by the name of the head that does; other actions teach "next"."""

HEADS: Final = ("next", *HEAD_ACTIONS)
"""What a scene may weigh, and a ranker may answer: the chance of the next event, or of the next of these actions."""

TARGET_ACTIONS: Final = ("cart", "purchase")
"""Actions whose next event is asked for by a protocol of that name, and answered by the head of that name."""

SESSION_PREFIX: Final = "session:"


def visitor_id(user_id: str | None, session_id: str | None) -> str:
    """The key under which a visitor's history is kept: the user's id, else `session:<session_id>`.

    Raises ValueError if both are missing.
    """
    if user_id:
        return user_id
    if session_id:
        return SESSION_PREFIX + session_id
    raise ValueError("an event needs a user_id or a session_id")


EVENT_SCHEMA: Final = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),  # visitor_id(): may be "session:..."
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("time_ms", pa.int64(), nullable=False),  # epoch ms, UTC; a plain order number on clock "order"
        pa.field("action", pa.string(), nullable=False),
        pa.field("session_id", pa.string()),
        pa.field("event_id", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("price", pa.float64()),
        pa.field("quantity", pa.float64()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("scene", pa.string()),
        pa.field("propensity", pa.float64()),
        pa.field("model", pa.string()),
        pa.field("variant", pa.string()),
    ]
)
"""`DATASET/events/*.parquet`: clean events, sorted by (user_id, time_ms)."""

SEQUENCE_SCHEMA: Final = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item", pa.list_(pa.int32()), nullable=False),  # item index, 1..N
        pa.field("action", pa.list_(pa.int8()), nullable=False),  # ACTION_CODE
        pa.field("time_ms", pa.list_(pa.int64()), nullable=False),
        pa.field("n_train", pa.int32(), nullable=False),  # events[:n_train] are training events
        pa.field("valid_at", pa.int32(), nullable=False),  # place of the validation target, -1 for none
        pa.field("test_at", pa.int32(), nullable=False),
        pa.field("purchase_valid_at", pa.int32(), nullable=False),  # of each of TARGET_ACTIONS alike
        pa.field("purchase_test_at", pa.int32(), nullable=False),
        pa.field("cart_valid_at", pa.int32(), nullable=False),
        pa.field("cart_test_at", pa.int32(), nullable=False),
    ]
)
"""`DATASET/sequences/*.parquet`: one row a visitor, engagements only, oldest first.

The history of a target at place p is events[:p]. A cart or purchase target that lies before `n_train`
(leave-one-out) is nobody's training target and is in no training count.
"""

ITEM_SCHEMA: Final = pa.schema(
    [
        pa.field("item_index", pa.int32(), nullable=False),  # 1..N, in row order; 0 is padding and "unknown"
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("category", pa.string()),  # several categories are joined by "|"
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),  # as in the catalogue, null where unknown
        pa.field("in_catalogue", pa.bool_(), nullable=False),
        pa.field("has_image", pa.bool_(), nullable=False),
        pa.field("category_codes", pa.list_(pa.int32()), nullable=False),  # into vocab/categories.json; 0 is unknown
        pa.field("brand_code", pa.int32(), nullable=False),  # into vocab/brands.json; 0 is unknown
        pa.field("title_codes", pa.list_(pa.int32()), nullable=False),  # hashed words, 1..2**14 - 1
        pa.field("price_scaled", pa.float32(), nullable=False),  # filled, clipped and normalised as configured
        pa.field("price_bucket", pa.int8(), nullable=False),  # decile 1..10 of known prices, 0 unknown
        pa.field("n_train", pa.int64(), nullable=False),  # training events (engagements) of the item
    ]
)
"""`DATASET/items/*.parquet`: every item of the catalogue or the logs, sorted by `item_index`."""

TITLE_BUCKETS: Final = 2**14

IMAGE_SCHEMA: Final = pa.schema(
    [
        pa.field("item_index", pa.int32(), nullable=False),
        pa.field("pixels", pa.binary(), nullable=False),  # size * size * 3 bytes, uint8 RGB, row-major HWC
    ]
)
"""`DATASET/images/*.parquet`: decoded images, one row an item that has a readable one."""

REJECT_SCHEMA: Final = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),  # relative to the raw folder
        pa.field("row", pa.int64(), nullable=False),  # 1 is the first row of data (below a header)
        pa.field("reason", pa.string(), nullable=False),
        pa.field("raw", pa.string()),  # the row as JSON, or the text of a line that could not be parsed
    ]
)
"""`DATASET/rejects/{events,items,images}/*.parquet`: each rejected row and why."""
