// Admin pages work without scripts; this copies links and follows what runs.
import { toast } from "./common.js";

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const field = button.parentElement.querySelector("[data-copied]");
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
      toast("Copied");
    } catch {
      toast("Press Ctrl+C to copy");
    }
  });
}

const running = document.querySelector("[data-poll][data-running]");
if (running) {
  const timer = setInterval(async () => {
    const answer = await fetch(running.dataset.poll);
    if (!answer.ok || !(await answer.json()).sampling) {
      clearInterval(timer);
      location.reload();
    }
  }, 1500);
}
