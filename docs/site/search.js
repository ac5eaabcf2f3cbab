// Material's search makes every word of a question the beginning of a word that it looks for: the `a` of "how do I resume a run"
// finds all words with an a at their start, and outweighs `resume`, while `images` does not find `image`. On its way to the search's
// worker a question therefore loses its small words, unless nothing else is there, and its words lose their endings. What
// the reader sees in the box stays.
(() => {
  const SMALL = new Set(
    ("a about am an and any are as at be been by can could did do does for from get has have how i if in into is it its me my of on or " +
      "our should so some that the their them then there these they this to use used using want was we were what when where which " +
      "who why will with would you your mean means").split(" ")
  );
  const ENDING = /^(.{4,}?)(?:ing|ed|es|e|(?<![su])s)$/i;
  const QUERY = 2;
  const post = Worker.prototype.postMessage;
  const beginning = (word) => {
    // a name such as swin_l or --run.resume stays as it is
    return /^[a-z]+$/i.test(word) ? word.replace(ENDING, "$1") : word;
  };
  const shortened = (question) => {
    const words = question.trim().split(/[\s?!,]+/).filter(Boolean);
    const telling = words.filter((word) => !SMALL.has(word.toLowerCase()));
    return (telling.length ? telling : words).map(beginning).join(" ");
  };
  Worker.prototype.postMessage = function (message, ...rest) {
    const asks = message && message.type === QUERY && typeof message.data === "string";
    return post.call(this, asks ? { ...message, data: shortened(message.data) } : message, ...rest);
  };
})();
