// Many equal pages, for programs_test.py: equal.js ROUNDS
// Buffers outside V8's heap and arrays within it, a few contents only; each round writes into some, replaces some,
// collects, rests so that something is merged, and reads everything. What it prints depends on ROUNDS alone.
'use strict';
const crypto = require('crypto');

const rounds = Number(process.argv[2]);
const COUNT = 300, BYTES = 64 * 1024, ARRAYS = 60, LENGTH = 16 * 1024;
let state = 12345;
function chance(n) {  // xorshift32
  state ^= state << 13; state ^= state >>> 17; state ^= state << 5;
  return (state >>> 0) % n;
}
const rest = new Int32Array(new SharedArrayBuffer(4));
function sleep(ms) { Atomics.wait(rest, 0, 0, ms); }

// What each buffer is filled with, and what has been written into it since.
const fills = [], writes = [], buffers = [];
function renew(i) {
  fills[i] = 65 + chance(5);
  writes[i] = new Map();
  buffers[i] = Buffer.alloc(BYTES, fills[i]);
}
for (let i = 0; i < COUNT; ++i) renew(i);
const arrays = [], values = [];
function renewArray(i) {
  values[i] = chance(4);
  arrays[i] = new Array(LENGTH).fill(values[i]);
}
for (let i = 0; i < ARRAYS; ++i) renewArray(i);

let wrong = 0;
function check(round) {
  for (let i = 0; i < COUNT; ++i) {
    const expected = Buffer.alloc(BYTES, fills[i]);
    for (const [at, value] of writes[i]) expected[at] = value;
    if (!expected.equals(buffers[i])) { ++wrong; console.log(`WRONG buffer ${i} in round ${round}`); }
  }
  for (let i = 0; i < ARRAYS; ++i) {
    for (let k = 0; k < LENGTH; ++k) {
      if (arrays[i][k] !== values[i]) { ++wrong; console.log(`WRONG array ${i}[${k}] in round ${round}`); break; }
    }
  }
}

for (let round = 0; round < rounds; ++round) {
  sleep(400);
  check(round);
  for (let n = 0; n < 200; ++n) {
    const i = chance(COUNT), at = chance(BYTES), value = chance(256);
    buffers[i][at] = value;
    writes[i].set(at, value);
  }
  for (let n = 0; n < 20; ++n) {  // in place: every page of them breaks, and may be merged again
    const i = chance(COUNT);
    fills[i] = 65 + chance(5);
    writes[i].clear();
    buffers[i].fill(fills[i]);
  }
  for (let n = 0; n < 20; ++n) renew(chance(COUNT));
  for (let n = 0; n < 6; ++n) renewArray(chance(ARRAYS));
  for (let n = 0; n < 6; ++n) {
    const i = chance(ARRAYS);
    arrays[i].fill(values[i] = chance(4));
  }
  if (global.gc) global.gc();
  check(round);
  const sum = crypto.createHash('sha256');
  for (const buffer of buffers) sum.update(buffer);
  for (const array of arrays) sum.update(String(array[chance(LENGTH)]));
  console.log(`round ${round} ${sum.digest('hex')}`);
}
console.log(wrong ? 'WRONG' : 'right');
process.exitCode = wrong ? 1 : 0;
