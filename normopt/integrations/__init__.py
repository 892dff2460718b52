"""Small adapters for other libraries. Each imports its library only when called."""

from normopt.integrations import timm as timm
