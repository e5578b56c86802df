// Requests to the server, one action at a time; notices when it is gone, and when it is back.

const GONE = "the server is gone: this page goes on when it is back. If it was stopped, start stm interact again.";
const RETRY = 1000;
const HEARTBEAT = 4000;

export class Server {
  // `on`: `status` and `error` after each action, `taken`, `back` with a status
  constructor(on) {
    this.on = on;
    // kept in sessionStorage: after a reload it is the same tab
    this.tab = sessionStorage.getItem("stm-tab") ?? crypto.randomUUID?.() ?? String(Math.random());
    sessionStorage.setItem("stm-tab", this.tab);
    this.queue = Promise.resolve();
    this.gone = false;
    setInterval(() => document.hidden || this.gone || this.act("status", {}, true), HEARTBEAT);
    window.addEventListener("pagehide", () => {
      fetch("/stm/do/leave", { method: "POST", body: "{}", keepalive: true, headers: { "x-stm-tab": this.tab } });
    });
  }

  async ask(path, body, type = "application/json") {
    const headers = { "x-stm-tab": this.tab, "content-type": type };
    const response = await fetch(path, { method: "POST", body, headers }).catch(() => this.lose());
    if (response.ok) return response;
    const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    if (response.status === 409) this.on.taken();
    throw new Error(answer.error);
  }

  // one request at a time, in the order of the user's actions; `quiet` leaves the message that is shown
  act(action, content = {}, quiet = false) {
    this.queue = this.queue.then(async () => {
      try {
        const response = await this.ask(`/stm/do/${action}`, JSON.stringify(content));
        this.on.status(await response.json(), quiet);
        return true;
      } catch (error) {
        this.on.error(error.message);
        return false;
      }
    });
    return this.queue;
  }

  async upload(kind, file, more = {}) {
    const query = new URLSearchParams({ name: file.name, ...more });
    return (await this.ask(`/stm/upload/${kind}?${query}`, file, "application/octet-stream")).json();
  }

  lose() {
    if (!this.gone) {
      this.gone = true;
      document.body.classList.add("stm-gone");
      setTimeout(() => this.retry(), RETRY);
    }
    throw new Error(GONE);
  }

  async retry() {
    const headers = { "x-stm-tab": this.tab };
    const response = await fetch("/stm/do/enter", { method: "POST", body: "{}", headers }).catch(() => null);
    if (!response?.ok) {
      setTimeout(() => this.retry(), RETRY);
      return;
    }
    this.gone = false;
    document.body.classList.remove("stm-gone");
    this.on.back(await response.json());
  }
}
