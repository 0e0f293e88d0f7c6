"""stub"""


def build_report(plan, placed, findings):
    return {}
