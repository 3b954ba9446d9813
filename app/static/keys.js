// Keys that work anywhere on the page but in a field that is typed in:
// 1 to 4 choose the tab, / goes to the first text field of the tab, ← and → press what is marked as previous and next.
(() => {
  const shown = (element) => element.offsetParent !== null;
  const isTypedIn = (element) =>
    element.isContentEditable || ['INPUT', 'TEXTAREA', 'SELECT'].includes(element.tagName) ||
    ['slider', 'listbox', 'combobox', 'tab', 'radio', 'menu'].includes(element.getAttribute('role'));
  // A tab that was opened just now gets its fields within a few frames.
  const toField = (frames) => {
    const field = Array.from(document.querySelectorAll('textarea, input[type=text]')).find(shown);
    if (field) field.focus();
    else if (frames > 0) requestAnimationFrame(() => toField(frames - 1));
  };
  document.addEventListener('keydown', (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || isTypedIn(event.target)) return;
    if (/^[1-9]$/.test(event.key)) {
      document.querySelectorAll('#tabs button[role=tab]')[Number(event.key) - 1]?.click();
    } else if (event.key === '/') {
      event.preventDefault();
      toField(60);
    } else if (event.key === 'ArrowLeft' || event.key === 'ArrowRight') {
      const way = event.key === 'ArrowLeft' ? '.key-previous' : '.key-next';
      const button = Array.from(document.querySelectorAll(`button${way}, ${way} button`)).find(shown);
      if (button && !button.disabled) button.click();
    }
  });
  // Who chose with the mouse goes on with the arrow keys in the images, not in the row of choices. At once, because the
  // next key may come before the page hears of the choice.
  document.addEventListener('change', (event) => {
    const leave = () => {
      if (event.target.type === 'radio' && !event.target.matches(':focus-visible')) event.target.blur();
    };
    leave();
    setTimeout(leave);
  });
  // A pasted image goes where the tab takes images.
  document.addEventListener('paste', (event) => {
    const files = event.clipboardData?.files;
    const field = Array.from(document.querySelectorAll('input[type=file]')).find(
      (input) => input.closest('.block')?.offsetParent,
    );
    if (!files?.length || !field) return;
    event.preventDefault();
    field.files = files;
    field.dispatchEvent(new Event('change', {bubbles: true}));
  });
})();
