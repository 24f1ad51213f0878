"""A page in a headless Chromium, as a user sees it, through Selenium."""

import io
import json
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image

PATIENCE = 120  # seconds; only a test that fails waits so long


class Page:
    """A page of dopsd_jax.demo in a browser, until the end of a `with` block."""

    def __init__(self, selenium, address, browser, driver, size="1200,900"):
        options = selenium.ChromeOptions()
        options.binary_location = browser
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu",
                         f"--window-size={size}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._address = address
        self._driver = selenium.Chrome(
            options=options, service=selenium.ChromeService(executable_path=driver)
        )

    def __enter__(self):
        self._driver.get(self._address)
        self._wait(lambda: self._find("#draw"))
        return self

    def __exit__(self, *_):
        self._driver.quit()

    def _find(self, selector):
        found = self._driver.find_elements("css selector", selector)
        return found[0] if found else None

    def _wait(self, ready):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(
            self._driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException]
        ).until(lambda _: ready())

    def press(self, name):
        self._find(f"#{name}").click()

    def set_text(self, name, text):
        from selenium.webdriver.common.keys import Keys

        field = self._find(f"#{name} textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def slide_to_the_left_end(self, name):
        """As with a mouse."""
        from selenium.webdriver.common.action_chains import ActionChains

        handle = self._find(f"#{name} input[type=range]")
        half = handle.size["width"] // 2
        ActionChains(self._driver).move_to_element_with_offset(
            handle, -half + 2, 0
        ).click().perform()

    def value(self, name):
        return float(self._find(f"#{name} input[type=number]").get_property("value"))

    def pictures(self, until=None):
        """Base and tuned, once both are there; with `until`, once they are those two."""
        def both():
            found = [self._picture(name) for name in ("base", "tuned")]
            if any(x is None for x in found):
                return None
            same = until is None or all(map(np.array_equal, found, until))
            return found if same else None

        return self._wait(both)

    def _picture(self, name):
        image = self._find(f"#{name} img")
        source = image and image.get_attribute("src")
        if not source:
            return None
        with urllib.request.urlopen(source) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))

    def told(self, beginning):
        """The line below the pictures, once it begins so."""
        def text():
            found = self._find("#told").text
            return found if found.startswith(beginning) else None

        return self._wait(text)

    def screenshot(self, file):
        self._driver.save_screenshot(str(file))

    def foreign_requests(self):
        """Addresses beyond this machine that the page asked for."""
        host = urllib.parse.urlparse(self._address).netloc
        sent = [json.loads(entry["message"])["message"]
                for entry in self._driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent
                if m["method"] == "Network.requestWillBeSent"]
        return [u for u in urls if urllib.parse.urlparse(u).netloc not in ("", host)]

    def console_errors(self):
        return [e["message"] for e in self._driver.get_log("browser") if e["level"] == "SEVERE"]
