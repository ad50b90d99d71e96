// The list of conversations: open, rename, delete, and older ones.
import { announce, call, complain, element, icon } from "./common.js";

const PAGE = 50; // conversations that are asked for at once

export function conversationList({ open, renamed, deleted }) {
  const list = document.getElementById("conversations");
  const older = document.getElementById("older");
  let current = null;
  let pages = 1; // that are shown

  async function refresh(id) {
    const found = [];
    let more = true;
    for (let page = 0; page < pages && more; page += 1) {
      const before = page ? `&before=${found.at(-1).changed_at}` : "";
      const some = await call("GET", `/api/conversations?limit=${PAGE}${before}`);
      found.push(...some);
      more = some.length === PAGE;
    }
    list.replaceChildren(...found.map(row));
    document.getElementById("no-conversations").hidden = found.length > 0;
    older.hidden = !more;
    mark(id);
  }

  older.addEventListener("click", async () => {
    const before = list.children.length;
    pages += 1;
    try {
      await refresh(current);
    } catch (error) {
      pages -= 1;
      complain(error);
      return;
    }
    const added = list.children.length - before;
    announce(added > 0 ? `${added} older chats` : "There are no older chats");
    (list.children[before] ?? list.lastElementChild)?.querySelector("a").focus();
  });

  function mark(id) {
    current = id;
    for (const item of list.children) {
      const link = item.querySelector("a");
      if (item.dataset.id === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  function row(conversation) {
    const link = element("a", {
      href: `/chat/${conversation.id}`, title: conversation.title,
      onclick(event) {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        history.pushState({}, "", link.href);
        open(conversation.id);
      },
    }, conversation.title || "Without a title");
    const name = conversation.title || "without a title";
    return element("li", { dataset: { id: conversation.id } }, link,
      element("button.icon-button.small", { type: "button", "aria-label": `Rename: ${name}`, onclick: () => rename(conversation) }, icon("pen")),
      element("button.icon-button.small", { type: "button", "aria-label": `Delete: ${name}`, onclick: () => remove(conversation) }, icon("bin")));
  }

  function rename(conversation) {
    const field = element("input", { name: "title", maxlength: "200", required: true, value: conversation.title, autocomplete: "off" });
    dialog("Rename the conversation", element("label.field", {}, "Title", field), "Rename", async () => {
      const made = await call("PATCH", `/api/conversations/${conversation.id}`, { title: field.value });
      renamed(made);
    });
    field.select();
  }

  function remove(conversation) {
    const text = element("p", {}, "This deletes “", conversation.title, "” with your feedback on it, and what was made of it for labellers. It can't be undone.");
    dialog("Delete the conversation?", text, "Delete", async () => {
      await call("DELETE", `/api/conversations/${conversation.id}`);
      deleted(conversation.id);
      if (current === conversation.id) current = null;
    }, "danger");
  }

  function dialog(title, content, verb, act, kind = "primary") {
    const box = document.getElementById("ask");
    const form = element("form.stack", {
      method: "dialog",
      async onsubmit(event) {
        if (event.submitter?.value !== "yes") return;
        try {
          await act();
          await refresh(current);
        } catch (error) {
          complain(error);
        }
      },
    }, element("h2", { id: "ask-title" }, title), content,
      element("div.row.end", {},
        element("button.button", { value: "no", formnovalidate: true, type: "submit" }, "Cancel"),
        element(`button.button.${kind}`, { value: "yes", type: "submit" }, verb)));
    // Enter in a field takes the form's first button otherwise, which is the one that cancels.
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("input")) {
        event.preventDefault();
        form.requestSubmit(form.querySelector('[value="yes"]'));
      }
    });
    box.replaceChildren(form);
    box.showModal();
  }

  return { refresh, mark };
}
