"""Save Video File's contact sheet in a real browser: the button shows it, and the video again."""

import pytest

BUTTON = ("app.graph._nodes.find(node => node.type === 'VideoLDMSaveVideo')"
          "?.widgets.find(widget => widget.name === 'Contact sheet / video')")


def press(page):
    """What is shown once the button has changed it."""
    before = shown(page)
    page.tab.evaluate(f"() => {{ {BUTTON}.callback(); }}")
    page.until(lambda: shown(page) not in ([], before))
    return shown(page)


def shown(page):
    return [player.kind for player in page.players(watched=0.1)]


def switch_and_back(page):
    """Open an empty workflow, then the one before it, and wait for what its node shows."""
    there = f"() => Boolean({BUTTON})"
    for command, expected in (("Comfy.NewBlankWorkflow", False), ("Workspace.PreviousOpenedWorkflow", True)):
        page.tab.evaluate("command => app.extensionManager.command.execute(command)", command)
        assert page.until(lambda expected=expected: page.tab.evaluate(there) == expected)
    assert page.until(lambda: shown(page))


@pytest.mark.slow
def test_the_sheet_and_the_video_take_turns_also_after_a_switch_of_workflow(page):
    page.open_template("quickstart")
    page.set_widgets("steps", 1)
    assert page.run(200).ended == "execution_success" and shown(page) == ["video"]
    page.tab.evaluate("() => { window.told = 0; app.api.addEventListener('executed', () => { window.told += 1; }); }")
    assert press(page) == ["img"]
    switch_and_back(page)
    assert {*shown(page), *press(page)} == {"video", "img"}     # whichever of them the page restores
    assert {*shown(page), *press(page)} == {"video", "img"}
    assert page.tab.evaluate("() => window.told") == 0 and page.errors() == []
