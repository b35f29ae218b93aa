// A heap with many equal objects, for programs_test.py: Equal.java ROUNDS
// Arrays of a few contents only and small objects that are all the same, moved about by the collector; each round
// writes into some, replaces some, collects, rests so that something is merged, and reads everything. What it prints
// depends on ROUNDS alone.
import java.util.Arrays;
import java.util.Random;
import java.util.zip.CRC32;

public class Equal {
  static final int COUNT = 600, BYTES = 64 * 1024, LISTS = 40, LENGTH = 20_000;

  static final class Small {
    long a = 1, b = 2;
    final Small next;
    Small(Small next) { this.next = next; }
  }

  static final Random chance = new Random(12345);
  static final byte[][] arrays = new byte[COUNT][];
  static final byte[] fills = new byte[COUNT];
  static final int[] touched = new int[COUNT];  // where a byte was written since, or -1
  static final Small[] lists = new Small[LISTS];
  static final long[][] words = new long[LISTS][];
  static int wrong;

  static void renew(int i) {
    fills[i] = (byte) (65 + chance.nextInt(5));
    touched[i] = -1;
    arrays[i] = new byte[BYTES];
    Arrays.fill(arrays[i], fills[i]);
  }
  static void renewList(int i) {
    Small list = null;
    for (int k = 0; k < LENGTH; ++k) list = new Small(list);
    lists[i] = list;
    words[i] = new long[LENGTH];
    Arrays.fill(words[i], i % 4);
  }
  static void complain(String what, int round) {
    if (++wrong < 20) System.out.println("WRONG " + what + " in round " + round);
  }

  static long check(int round) {
    final CRC32 sum = new CRC32();
    for (int i = 0; i < COUNT; ++i) {
      final byte[] array = arrays[i];
      for (int k = 0; k < BYTES; ++k) {
        if (array[k] != (k == touched[i] ? (byte) ~fills[i] : fills[i])) {
          complain("array " + i + "[" + k + "]", round);
          break;
        }
      }
      sum.update(array);
    }
    for (int i = 0; i < LISTS; ++i) {
      int length = 0;
      for (Small at = lists[i]; at != null; at = at.next, ++length) {
        if (at.a != 1 || at.b != 2) complain("list " + i, round);
      }
      if (length != LENGTH) complain("length of list " + i, round);
      for (long word : words[i]) {
        if (word != i % 4) {
          complain("words " + i, round);
          break;
        }
      }
    }
    return sum.getValue();
  }

  public static void main(String[] arguments) throws Exception {
    final int rounds = Integer.parseInt(arguments[0]);
    for (int i = 0; i < COUNT; ++i) renew(i);
    for (int i = 0; i < LISTS; ++i) renewList(i);
    for (int round = 0; round < rounds; ++round) {
      Thread.sleep(400);
      check(round);
      for (int n = 0; n < 150; ++n) {
        final int i = chance.nextInt(COUNT);
        if (touched[i] >= 0) arrays[i][touched[i]] = fills[i];
        touched[i] = chance.nextInt(BYTES);
        arrays[i][touched[i]] = (byte) ~fills[i];
      }
      for (int n = 0; n < 30; ++n) renew(chance.nextInt(COUNT));
      for (int n = 0; n < 4; ++n) renewList(chance.nextInt(LISTS));
      if (round % 2 == 0) System.gc();
      System.out.println("round " + round + " " + Long.toHexString(check(round)));
    }
    System.out.println(wrong == 0 ? "right" : "WRONG");
    System.exit(wrong == 0 ? 0 : 1);
  }
}
