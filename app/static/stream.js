// Requests of the page and their responses, in order and without loss. Gradio posts each request, which replies with an id,
// and reads all responses from one stream of server-sent events. When several are on their way, three things can go wrong:
// - Requests travel by connections of their own and may overtake each other. Hence each waits for the reply to the last.
// - A response may be there before the reply with its id. Gradio puts it aside until then and shows it after the responses to
//   later requests, over them. Hence responses wait for the replies that are on their way.
// - The server ends the stream when nothing is pending. A request that crosses the end would never be answered, because
//   the page believes that its stream is open. Hence the page hears of the end only when it waits for nothing.
(() => {
  const plain = window.fetch.bind(window);
  const pending = new Set();
  const encoder = new TextEncoder();
  let replied = Promise.resolve();

  const join = (...request) => {
    const reply = replied.then(async () => {
      const response = await plain(...request);
      const body = await response.clone().json().catch(() => null);
      if (body?.event_id) {
        pending.add(body.event_id);
        // Read already: Gradio, which asks for it now, knows the id before anything else happens.
        response.json = async () => body;
      }
      return response;
    });
    const known = () => new Promise((resolve) => setTimeout(resolve));
    replied = reply.then(known, known);
    return reply;
  };

  async function* messages(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ''; ;) {
      const {done, value} = await reader.read();
      if (done) return;
      const parts = (rest + value).split('\n\n');
      rest = parts.pop();
      yield* parts;
    }
  }

  const pass = async (response, request, stream) => {
    const send = (message) => stream.enqueue(encoder.encode(`${message}\n\n`));
    for (;;) {
      let end = null;
      for await (const message of messages(response)) {
        await replied;
        const {msg, event_id} = JSON.parse(message.replace(/^data: /, ''));
        if (msg === 'process_completed') pending.delete(event_id);
        if (msg === 'close_stream') end = message;
        else send(message);
      }
      await replied;
      if (end === null || !pending.size) {
        if (end !== null) send(end);
        return stream.close();
      }
      response = await plain(...request);
      if (!response.ok) throw new Error(`the stream of responses: ${response.status}`);
    }
  };

  const open = async (...request) => {
    const response = await plain(...request);
    if (!response.ok) return response;
    const start = (stream) => {
      pass(response, request, stream).catch((error) => stream.error(error));
    };
    return new Response(new ReadableStream({start}), {headers: response.headers});
  };

  window.fetch = (...request) => {
    const {pathname} = new URL(request[0].url ?? request[0], document.baseURI);
    if (pathname.endsWith('/queue/join')) return join(...request);
    return (pathname.endsWith('/queue/data') ? open : plain)(...request);
  };
})();
