from hub_fixtures import hub  # noqa: F401
