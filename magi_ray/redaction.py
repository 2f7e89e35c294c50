"""Secrets in addresses: taken out of whatever is shown or stored."""

from __future__ import annotations

import re

_HIDDEN = "***"
# What stands before the '@' of an address. Secret keys of AWS hold '/', so after a ':' that begins no port anything
# up to the '@' belongs to it.
_USER = re.compile(r"""(?<=://)(?:[^\s/"'<>]*|[^\s/@:"'<>]+:(?!\d{1,5}(?:[/?#\s]|$))[^\s"'<>]*)@""")
_SIGNATURE = re.compile(
    r"""((?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId"""
    r"""|[?&](?:Signature|sig|token|access_token|api_key|password|secret))=)[^&\s"'<>#]+""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """``text`` with *** for users and passwords in addresses, and for signatures and tokens in their queries."""
    return _SIGNATURE.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
