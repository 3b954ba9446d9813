// While something is still trained the masthead shows how far it is; once it is served the page is loaded again.
(() => {
  const ask = async () => {
    const shown = document.querySelector('#pending span');
    if (!shown) return document.querySelector('#masthead header') ? undefined : setTimeout(ask, 500);
    try {
      const {line} = await (await fetch('pending')).json();
      if (!line) return location.reload();
      shown.textContent = line;
    } catch { /* the server is busy, or has ended */ }
    setTimeout(ask, 2000);
  };
  setTimeout(ask, 500);
})();
